"""Tokenizers of the kinds that models come with, small and made on the spot."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quantlab import text

BYTES = 3  # the id of <0x00> in the SentencePiece-like tokenizer


def sentence_piece_like(folder: Path, strip: bool = True) -> text.Tokenizer:
    """As Llama 2's: pieces with a mark for a space, bytes for what has no piece."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁▁", "a", "b", "h", "é", "▁a", "▁h", "ab", "ha", "日", "日本", "😀", "\n", "<", "0", "x", "▁日"]
    merges = [("▁", "▁"), ("▁", "a"), ("▁", "h"), ("a", "b"), ("h", "a"), ("▁", "日")]
    model = models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges, unk_token="<unk>", byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    prepend = [normalizers.Prepend("▁")] if strip else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    return saved(tokenizer, folder)


def byte_level(folder: Path) -> text.Tokenizer:
    """As GPT-2's and Llama 3's, with a token for each byte and a few merges, of which some cut characters in two."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "a"), ("a", "b"), ("Ã", "©"), ("æ", "Ĺ"), ("Ġ", "Ġ"), ("ð", "Ł"), ("ĺ", "Ģ")]
    pieces = [*alphabet, *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return saved(tokenizer, folder)


def word_piece(folder: Path) -> text.Tokenizer:
    """As BERT's: what a token adds depends on the one before it."""
    pieces = ["<unk>", "a", "##b", "hello", "##lo", "日", ".", ",", "##x"]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return saved(tokenizer, folder)


def saved(tokenizer: Tokenizer, folder: Path) -> text.Tokenizer:
    """With two special tokens and a plain added one, written to `folder` and read as a checkpoint's."""
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True), AddedToken("<é 日>", special=True)])
    tokenizer.add_tokens([AddedToken("plain added", special=False)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    return text.load_tokenizer(folder)
