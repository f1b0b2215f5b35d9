"""The candidate as it is served: its final states from the engine's own forward pass, or the engine itself for tasks.

Knows nothing about scores, files of results or the baseline.
"""

from dataclasses import replace

import torch

from quantlab.checkpoint.model_folder import open_model
from quantlab.eval.answers import Answers, task_rows
from quantlab.eval.measure import Side
from quantlab.eval.options import ServedOptions
from quantlab.eval.protocol import Windows
from quantlab.eval.result import ServedFacts
from quantlab.eval.served_answers import ServedAnswers
from quantlab.eval.setup import Setup
from quantlab.runtime.build import build_engine
from quantlab.runtime.options import EngineOptions
from quantlab.runtime.whole_texts import WholeTexts, load_whole_texts


def load_served(setup: Setup, asked: ServedOptions) -> WholeTexts:
    """The candidate of `setup`, able to run as many windows together as the evaluation does.

    Raises what the engine refuses: CheckpointError, UnsupportedModel, or UsageError for what has no kernel there.
    """
    longest = max(len(row) - 1 for windows in setup.texts.values() for row in windows.rows)
    return load_whole_texts(setup.options.candidate, _engine_options(setup, asked), setup.place.batch, longest)


def load_answers(setup: Setup, asked: ServedOptions) -> ServedAnswers:
    """The candidate of `setup` in an engine, for as many tasks together as in plain torch; raises as `load_served`."""
    options = replace(_engine_options(setup, asked), max_num_seqs=task_rows(setup.place.batch))
    return ServedAnswers(build_engine(setup.options.candidate, options))


def told_of_length(setup: Setup, answers: Answers) -> str | None:
    """What to say where the engine takes shorter texts than the model: it is cut to memory, the baseline is not."""
    own, taken = open_model(setup.options.candidate).config.max_position_embeddings, answers.max_length + 1
    if taken >= own:
        return None
    return f"the engine takes {taken:,} tokens and the model {own:,}: of longer prompts it reads less than the baseline"


def _engine_options(setup: Setup, asked: ServedOptions) -> EngineOptions:
    place = setup.place
    return EngineOptions(
        device=str(place.device), dtype=place.dtype_name, kv_dtype=asked.kv_dtype, int8_head=asked.int8_head
    )


def served_side(model: WholeTexts, windows: Windows) -> Side:
    """The side of a served model, which runs whenever its states are asked for."""

    def states(rows: range) -> torch.Tensor:
        ids = torch.stack([windows.rows[index][:-1] for index in rows])
        return model.states(ids)[:, -windows.lengths[rows.start] :].flatten(0, 1)

    return Side(states, model.logits)


def served_facts(model: WholeTexts, asked: ServedOptions, dtype: str) -> ServedFacts:
    """How the candidate was run, for the report."""
    kv_dtype = dtype if asked.kv_dtype == "auto" else asked.kv_dtype
    return ServedFacts(kv_dtype=kv_dtype, kernels=model.kernels)
