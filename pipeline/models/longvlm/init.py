"""LongVLMs with weights that nobody has trained yet: all of a small one, a LLaMA's projector, the rows of new words.

The small one is to train from scratch, and for tests and benchmarks; never for answers.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from longvlm.pipeline.model_folder import SAFETENSORS
from longvlm.pipeline.models.checkpoints import EMBED, HEAD
from longvlm.pipeline.models.longvlm.checkpoint import find_checkpoint
from longvlm.pipeline.models.longvlm.model import PROJECT, PROJECT_BIAS
from longvlm.pipeline.models.longvlm.tokenizer import load_tokenizer
from longvlm.pipeline.models.prompt import VIDEO_TOKENS, PromptLayout
from longvlm.pipeline.vision.towers.families import describe_tower
from longvlm.pipeline.weights import save_tensors
from longvlm.schemas.errors import InputError

SPECIALS = ("<unk>", "<s>", "</s>")
_STD = 0.02  # LLaMA's own, for weights that are drawn
WORDS = """
a about above across after again against all along an and another appears are around as at away back background ball
bar before begins behind beside between bicycle big bird black blue boat both bottom bright brown building but by
camera car cat changes child circle clear close cloud color colour colours content corner count crosses cuts dark
describe detail different direction disappears dog door down during each empty end ends everything explain fades
falls far fast field first follow follows for from front gradient gray green ground group grows happening happens
hand has he her here his horizontal how image in inside instructions into is it its jumps large later leaves left
light line little long look looks man many middle more morning moves moving natural near nearly next night no nobody
not nothing object objects of off on once one only opens or orange other out outside over pale pan part pattern
people person picture pink plain purple quickly quiet rectangle red right rises road rolls room rotates round runs
same scene screen second seconds see seen several shape shapes shows shrinks side sits sky slides slow slowly small
smooth someone something soon spins square stands star starts static stays still stops street stripes sun that the
then there they thing things this three time to together top toward tree triangle turns twice two under until up
vertical very video view visible waits walks wall water wave we what when where which while white who why wide will
with woman word yellow yes you zoom zooms . , ? ! : ; ' - 0 1 2 3 4 5 6 7 8 9 10
able assist assistant based carefully language longvlm of on provided provides understand user variety vision your
""".split()  # noqa: SIM905 - a list of 300 lines reads worse


@dataclass(frozen=True)
class Shape:
    """Sizes and words of a language model; by default of about half a million weights."""

    hidden: int = 128  # width, a multiple of 32
    layers: int = 2  # blocks
    intermediate: int | None = None  # width inside a block's MLP; None: twice `hidden`
    words: Sequence[str] = tuple(WORDS)  # its vocabulary, besides the special tokens
    layout: PromptLayout = "plain"


def build_untrained(path: Path, tower: str, tower_dim: int, shape: Shape | None = None, *, seed: int = 0) -> None:
    """Write a complete LongVLM folder of random weights, whose answers are random words.

    Args:
        path: folder to make; its files are replaced.
        tower: what `mm_vision_tower` says: a folder (relative to `path`, or absolute) or a hub id.
        tower_dim: width of that tower's tokens, the projector's input.
        shape: of the language model.
        seed: of the weights; the same seed writes the same bytes.
    """
    path.mkdir(parents=True, exist_ok=True)
    shape = shape or Shape()
    tokenizer = word_tokenizer(shape.words)
    llama = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate or 2 * shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.hidden // 32,
        "max_position_embeddings": 8192,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    tokenizer.save(str(path / "tokenizer.json"))
    save_tensors(random_weights(llama, tower_dim, seed), path / SAFETENSORS)
    config = {
        "architectures": ["LongVLMForCausalLM"],
        "model_type": "LongVLM",
        **llama,
        "mm_vision_tower": tower,
        "mm_hidden_size": tower_dim,
        "use_mm_proj": True,
        "mm_use_vid_start_end": True,
        **({} if shape.layout == "plain" else {"mm_prompt_layout": shape.layout}),
    }
    _write_json(path / "config.json", config)
    special = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIALS, strict=True))
    _write_json(path / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **special})


def word_tokenizer(words: Sequence[str]) -> Tokenizer:
    """A tokenizer of whole words, lower-cased; any other word is `<unk>`. BOS is added, as LLaMA's does.

    Times such as 0:08 are words; a comma or full stop of an answer follows its word without a space.
    """
    vocab = {word: i for i, word in enumerate(dict.fromkeys([*SPECIALS, *words]))}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))  # noqa: S106  (a word, not a secret)
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Split(Regex(r"\d+:\d\d|\w+|[^\w\s]"), "removed", invert=True)
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (*SPECIALS, *VIDEO_TOKENS)])
    return tokenizer


def random_weights(llama: dict[str, Any], tower_dim: int, seed: int) -> dict[str, Tensor]:
    """Every tensor of the checkpoint by its name in the reference's layout (LONGVLM.md section 5)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(LlamaConfig(**llama)).state_dict().items()}
    shapes["model.mm_projector.weight"] = torch.Size([llama["hidden_size"], tower_dim])
    shapes["model.mm_projector.bias"] = torch.Size([llama["hidden_size"]])
    weights = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            weights[name] = torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        else:
            fan_in = 1 if "embed_tokens" in name else shape[1]
            weights[name] = torch.randn(shape, generator=generator) / fan_in**0.5
    weights["lm_head.weight"][-len(VIDEO_TOKENS) :] = 0  # never trained, never emitted
    return weights


def grow_vocabulary(model: Path, folder: Path, words: Sequence[str], *, seed: int = 0) -> None:
    """Write a LongVLM of `word_tokenizer` once more, knowing more words than before.

    A new word is read as a vector drawn with the mean and spread of the old ones. The head's row for it is their mean,
    but for a little noise: its logit is about the average one, which is below the largest, so that answers stay what
    they were until the word is trained (John Hewitt, "Initializing New Word Embeddings for Pretrained Language
    Models", 2021).

    Args:
        model: the LongVLM's folder.
        folder: folder to make.
        words: what it is to know besides; those that it knows are left out.
        seed: of the new rows; the same seed writes the same bytes.

    Raises:
        ValueError: its tokenizer is none of whole words with the video tokens at the end.
    """
    checkpoint = find_checkpoint(str(model))
    tokenizer, tensors = load_tokenizer(checkpoint.tokenizer), checkpoint.tensors()
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    known = sorted(vocabulary, key=lambda word: vocabulary[word])
    grown = word_tokenizer([*known[len(SPECIALS) :], *words])
    num_old, num_new = len(known), grown.get_vocab_size() - tokenizer.get_vocab_size()
    if word_tokenizer(known[len(SPECIALS) :]).to_str() != tokenizer.to_str():
        raise ValueError(f"the vocabulary of {model} is not one of whole words")
    generator = torch.Generator().manual_seed(seed)
    for name, is_read in ((EMBED, True), (HEAD, False)):
        old, marks = tensors[name][:num_old], tensors[name][num_old:]
        spread = old.std(dim=0) if is_read else _STD
        new = old.mean(dim=0) + spread * torch.randn(num_new, old.shape[1], generator=generator)
        tensors[name] = torch.cat([old, new.to(old.dtype), marks])
    shutil.copytree(model, folder, dirs_exist_ok=True)
    save_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / SAFETENSORS)
    grown.save(str(folder / "tokenizer.json"))
    _write_json(folder / "config.json", {**checkpoint.config, "vocab_size": len(tensors[EMBED])})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def is_begun(model: str) -> bool:
    """Whether a LongVLM has a projector already.

    Raises:
        InputError: this is no language model (see `find_checkpoint`).
    """
    checkpoint = find_checkpoint(model)
    return PROJECT in checkpoint.tensors() or checkpoint.projector is not None


def begin(model: str, folder: Path, seed: int) -> None:
    """Write a whole LongVLM over a base LLaMA whose config names a tower, with what is new drawn by a seed.

    Raises:
        InputError: the base lacks something, or its tokenizer does not fit.
    """
    checkpoint = find_checkpoint(model)
    tensors, tokenizer = checkpoint.tensors(), load_tokenizer(checkpoint.tokenizer)
    width = describe_tower(checkpoint.tower).dim
    generator = torch.Generator().manual_seed(seed)
    if EMBED not in tensors:
        raise InputError(f"the weights of {model} lack {EMBED}; copy the checkpoint again.")
    if tokenizer.get_vocab_size() == len(tensors[EMBED]) + len(VIDEO_TOKENS):
        for name in {EMBED, HEAD} & set(tensors):
            tensors[name] = with_video_rows(tensors[name], generator)
    bound = width**-0.5  # of torch's own linear layers
    hidden = tensors[EMBED].shape[1]
    for name, shape in ((PROJECT, (hidden, width)), (PROJECT_BIAS, (hidden,))):
        tensors[name] = nn.init.uniform_(torch.empty(shape), -bound, bound, generator).to(tensors[EMBED].dtype)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / SAFETENSORS)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = Path(checkpoint.config["mm_vision_tower"])
    tower = str(Path(checkpoint.tower).resolve()) if Path(checkpoint.tower).is_dir() else str(named)
    config = {**checkpoint.config, "vocab_size": len(tensors[EMBED]), "mm_hidden_size": width, "mm_vision_tower": tower}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def with_video_rows(weight_VD: Tensor, generator: torch.Generator) -> Tensor:  # noqa: N803 - named by its shape
    """Rows for the video tokens after those of the vocabulary: <vid_patch> is drawn, the marks are the mean of all.

    As the reference adds them to embedding and head (LONGVLM.md section 7).
    """
    patch = torch.randn(1, weight_VD.shape[1], generator=generator) * _STD
    rows = torch.cat([weight_VD.float(), patch])
    return torch.cat([rows, rows.mean(dim=0, keepdim=True).expand(2, -1)]).to(weight_VD.dtype)
