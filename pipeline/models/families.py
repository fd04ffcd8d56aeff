"""The model families, told apart by their config alone.

The code of language models takes seconds to load, so it is where one is described or built.
"""

from longvlm.pipeline.model_folder import read_json, resolve
from longvlm.pipeline.models.contract import LanguageModel, ModelSpec
from longvlm.pipeline.models.llava import checkpoint as llava_checkpoint
from longvlm.pipeline.models.longvlm import checkpoint as longvlm_checkpoint
from longvlm.pipeline.models.prefix import Sight
from longvlm.schemas.recipe import Precision


def can_answer(model: str) -> bool:
    """Whether a folder or hub id holds a language model of a known family, and not a vision tower, by its config alone.

    Raises:
        InputError: there is no such model, or it has no config.json.
    """
    kind = read_json(resolve(model), "config.json").get("model_type")
    return kind in llava_checkpoint.FAMILIES or kind in longvlm_checkpoint.FAMILIES


def sight_of(model: str) -> Sight:
    """What a model that can answer sees a video through, by its config alone: the `sight` of its spec.

    Raises:
        InputError: its config says that tokens cannot be stored for it.
    """
    if is_llava(model):
        return llava_checkpoint.find_llava(model).sight
    return longvlm_checkpoint.find_checkpoint(model).sight


def describe_model(model: str) -> ModelSpec:
    """What a model is, without building it; its weights are only mapped and hashed.

    Raises:
        InputError: the model lacks something, or belongs to no known family.
    """
    if is_llava(model):
        from longvlm.pipeline.models.llava.model import describe_llava

        return describe_llava(model)
    from longvlm.pipeline.models.longvlm.model import describe_longvlm

    return describe_longvlm(model)


def load_model(model: str, precision: Precision = "float32", device: str = "cpu") -> LanguageModel:
    """A model on a device.

    Raises:
        InputError: as `describe_model`.
    """
    if is_llava(model):
        from longvlm.pipeline.models.llava.model import load_llava

        return load_llava(model, precision, device)
    from longvlm.pipeline.models.longvlm.model import load_longvlm

    return load_longvlm(model, precision, device)


def is_llava(model: str) -> bool:
    """Whether it is in transformers' layout: a LongVLM may also call itself llava, with LLaMA's fields unnested."""
    config = read_json(resolve(model), "config.json")
    return config.get("model_type") in llava_checkpoint.FAMILIES and "text_config" in config
