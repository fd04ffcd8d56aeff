"""On what terms a model is asked: the template, budget and focus of a run, where they are left open and where not."""

from collections.abc import Iterable

from longvlm.pipeline.models.contract import ModelSpec
from longvlm.pipeline.store.ledger import RegisteredRecipe
from longvlm.schemas.errors import InputError
from longvlm.schemas.recipe import AnswerRecipe, Focus

ROOM_FOR_QUESTION = 512  # tokens: a template's own words (LongVLM's are about 70) and a question of some 300 words


def fit_template(spec: ModelSpec, template: str | None) -> str:
    """The prompt template: the named one, or the model's first. Raises InputError where the model lacks it."""
    if template is None:
        return spec.templates[0]
    if template not in spec.templates:
        raise InputError(f"the model {spec.name} has no template {template}; it has {', '.join(spec.templates)}.")
    return template


def fit_budget(spec: ModelSpec, budget: int | None, max_new_tokens: int) -> int:
    """The most visual tokens of a prefix: the named number, or what the context holds beside a question and its answer.

    Raises:
        InputError: nothing of a video would fit, or the context could not hold the budget.
    """
    room = spec.context - max_new_tokens - ROOM_FOR_QUESTION
    if budget is None:
        if room <= spec.sight.num_global_tokens:
            raise InputError(
                f"the context of {spec.name} is {spec.context} tokens, and {max_new_tokens} new ones and "
                f"{ROOM_FOR_QUESTION} for the question leave none for the video; lower --max-new-tokens, or set "
                "--budget."
            )
        return room
    if budget <= spec.sight.num_global_tokens:
        raise InputError(
            f"a budget of {budget} holds nothing of a video but {spec.name}'s {spec.sight.num_global_tokens} global "
            "tokens; raise --budget."
        )
    if budget + max_new_tokens >= spec.context:
        raise InputError(
            f"a budget of {budget} and {max_new_tokens} new tokens do not fit the {spec.context} tokens of context "
            f"that {spec.name} has; lower --budget or --max-new-tokens."
        )
    return budget


def fit_focus(stored: RegisteredRecipe, focus: Focus | None, budget: int | None) -> Focus | None:
    """What gives way in a long video. Without a budget of the user's own every video is to be answered: evenly.

    Raises:
        InputError: the focus follows the question, but nothing says how near a segment is to a text.
    """
    if focus == "question" and stored.recipe.tower.search_dim is None:
        raise InputError(
            f"--focus question needs search embeddings, but the tower {stored.recipe.tower.name} has no text encoder; "
            "use --focus even, or --focus auto, which follows the times that questions name."
        )
    return focus if focus is not None or budget is not None else "even"


def note_decoding(spec: ModelSpec, recipe: AnswerRecipe) -> str | None:
    """What a model asks for and a greedy run leaves out, as a note of the run; None where there is nothing."""
    asked = {name: value for name, value in spec.asked_decoding.items() if name != "do_sample"}
    if recipe.temperature or not spec.asked_decoding:
        return None
    samples = "do_sample" in spec.asked_decoding
    named = ", ".join(f"{name} {value}" for name, value in asked.items())
    wanted = (f"sampling ({named})" if named else "sampling") if samples else named
    options = f"--temperature {asked.get('temperature', 1.0)}" if samples else ""
    if samples and "top_p" in asked:
        options += f" --top-p {asked['top_p']}"
    without = " and ".join(name for name in asked if name not in ("temperature", "top_p"))
    said = f"generation_config.json of {spec.name} asks for {wanted}, but answers are decoded greedily"
    said += f"; {options} samples" if samples else ""
    return f"{said}; there is no option for {without}." if without else f"{said}."


def check_vocabulary(spec: ModelSpec, asked: Iterable[tuple[str, str | None, str]]) -> None:
    """Refuse numbers and JSON that a model's vocabulary cannot spell.

    Args:
        spec: of the model.
        asked: type, schema, and a question that is of these.

    Raises:
        InputError: there are some.
    """
    from longvlm.pipeline.answering.grammar import check_spelling
    from longvlm.pipeline.engine.grammar import Speller

    speller = Speller(spec.vocabulary)
    for kind, schema, question in asked:
        try:
            check_spelling(speller, kind, schema)
        except ValueError as error:
            raise InputError(
                f"the vocabulary of {spec.name} cannot spell the answer of type {kind} to {question!r} ({error}); ask "
                "it as text, or ask another model."
            ) from error
