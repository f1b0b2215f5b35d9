"""/tokenize and /detokenize: what a prompt is served as.

Knows nothing about HTTP or engines.
"""

from quantlab.server.chat import plain
from quantlab.server.completions import read_text
from quantlab.server.protocol import DetokenizeBody, TokenizeBody
from quantlab.server.responses import Detokenized, Tokenized
from quantlab.server.service import Service


async def tokenize(service: Service, body: TokenizeBody) -> Tokenized:
    """The ids of a text, or of a conversation through the template; raises ApiError for a text without any."""
    service.check_model(body.model)
    info = service.known_info()
    if body.messages is not None:
        messages = [plain(message) for message in body.messages]
        text = await service.strangers.render(messages, body.add_generation_prompt, False, {})
        ids = await read_text(service.texts, text, info, special_tokens=False)
    else:
        ids = await read_text(service.texts, body.prompt or "", info, body.add_special_tokens)
    names = [service.texts.vocabulary.text(token) for token in ids] if body.return_token_strs else None
    return Tokenized(len(ids), info.max_model_len, list(ids), names)


def detokenize(service: Service, body: DetokenizeBody) -> Detokenized:
    """The text of ids, special tokens spelled out; raises ApiError for a model that is not served."""
    service.check_model(body.model)
    return Detokenized(service.texts.decode(body.tokens))
