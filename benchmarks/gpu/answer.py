"""Answering throughput: eight questions on each of 1, 8 and 64 videos by a LLaMA of 7B, beside what it could be.

Answers are of 20 tokens, or yes or no. Prefill is held to the peak of a square product. A decode step's floor is the
time that reading the weights and the keys and values once takes, at the bandwidth of a matrix-vector product. Beside it
stand transformers' own `generate`, one question at a time and left-padded, over the questions of one video, which 8 and
64 videos would need 8 and 64 times. The host's own time a step is that of a model whose arithmetic is nothing.
"""

from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.answer import (
    TOWER_DIM,
    LlamaShape,
    Load,
    RandomModel,
    explain,
    left_padded,
    median_run,
    one_by_one,
    random_model,
    run_engine,
    yes_or_no,
)
from benchmarks.gpu.section import Found, Run
from benchmarks.measure import bandwidth, finished, interleave, peak_flops
from longvlm.pipeline.engine.engine import Engine
from longvlm.schemas.recipe import AnswerRecipe

SHAPE, LOAD, ROUNDS, SIDE = LlamaShape(4096, 32, 32, 11008), Load(answer_tokens=(20,) * 8), 3, 8192
TINY_SHAPE, TINY_LOAD = LlamaShape(64, 2, 4, 128, vocabulary=256), Load(answer_tokens=(4,) * 8, num_visual=40)
TINY_SIDE, TINY_BANDWIDTH_ROWS = 256, 64
VIDEOS, TINY_VIDEOS = (1, 8, 64), (1, 2, 4)
# Arithmetic of this one is nothing, so that what is left of a step is the host's.
HOST_SHAPE, HOST_VISUAL, HOST_BEFORE = LlamaShape(64, 32, 4, 64, vocabulary=256), 16, 4
HOST_TOKENS, TINY_HOST_TOKENS = 40, 8


def run(run: Run) -> None:
    """The host first: it takes little. Then transformers, before the model's layers are the engine's."""
    torch.manual_seed(0)
    host = run.part("host", lambda: host_time(run))
    if host:
        run.note(host_ms_per_step=host["rows_8"])
    shape, load, videos = (TINY_SHAPE, TINY_LOAD, TINY_VIDEOS) if run.is_tiny else (SHAPE, LOAD, VIDEOS)
    rates = (
        (peak_flops(run.device, TINY_SIDE), bandwidth(run.device, TINY_BANDWIDTH_ROWS))
        if run.is_tiny
        else (peak_flops(run.device, SIDE), bandwidth(run.device))
    )
    run.note(peak_tflops=rates[0] / 1e12, bandwidth_gb_per_s=rates[1] / 1e9)
    run.say(f"peak {rates[0] / 1e12:.3g} TFLOP/s, bandwidth {rates[1] / 1e9:.0f} GB/s")
    model = random_model(shape, run.device)
    prefixes = [torch.randn(load.num_visual, TOWER_DIM) for _ in range(max(videos))]
    plain = run.part("transformers", lambda: transformers(run, model, prefixes[0], load))
    engine = Engine(model, AnswerRecipe("random", "random", "random", max_new_tokens=max(load.answer_tokens)))
    run.note(max_rows=engine.max_rows, kv_bytes=engine.kv_bytes)
    measured = [run.part(f"engine_{n}x8", lambda n=n: measure(run, engine, prefixes[:n], load, rates)) for n in videos]  # type: ignore[misc]
    _, some, most = measured
    if some:  # of 64 rows: enough for a step's floor to matter, and few enough for it to be the memory's
        run.note(decode_over_floor=some["decode_over_floor"], prefill_peak_share=some["prefill_peak_share"])
    if most:
        run.note(questions_per_s=most["questions_per_s"], bool_per_s=most["bool_per_s"])
        if plain:
            ratios = {f"over_{name}": most["questions_per_s"] / plain[name] for name in ("one_by_one", "left_padded")}
            run.note(**ratios, over_yes_or_no=most["bool_per_s"] / plain["yes_or_no"])


def measure(run: Run, engine: Engine, prefixes: list[Tensor], load: Load, rates: tuple[float, float]) -> Found:
    """Both kinds of question about some videos, each answer checked."""
    texts: list[Any] = []
    bools: list[Any] = []
    interleave(
        {
            "text": lambda: texts.append(run_engine(engine, prefixes, (), load)),
            "bool": lambda: bools.append(run_engine(engine, prefixes, ("Yes", "No"), load)),
        },
        1 if run.is_tiny else ROUNDS,
    )
    text, judged = median_run(texts), median_run(bools)
    asked = len(prefixes) * len(load.questions)
    parts = {"text": explain(engine.model, text, len(prefixes), rates, load)}  # type: ignore[arg-type] # it is ours
    parts["bool"] = explain(engine.model, judged, len(prefixes), rates, load)  # type: ignore[arg-type]
    stats, text_s = text
    found = {
        "videos": len(prefixes),
        "questions_per_s": asked / text_s,
        "bool_per_s": asked / judged[1],
        "prefill_peak_share": parts["bool"]["peak_share"],
        "decode_over_floor": 1 / parts["text"]["bandwidth_share"],
        "ms_per_step": stats.decode_s / stats.num_steps * 1e3,
        "steps": stats.num_steps,
        "rows_per_step": stats.decode_tokens / stats.num_steps,
        "max_rows": engine.max_rows,  # fewer than before, where memory ran out
        **parts,
    }
    run.say(
        f"{len(prefixes)} videos: {found['questions_per_s']:.1f} questions/s, yes/no {found['bool_per_s']:.1f}/s; "
        f"prefill {found['prefill_peak_share']:.0%} of peak, a step of {found['rows_per_step']:.0f} rows "
        f"{found['ms_per_step']:.2f} ms, {found['decode_over_floor']:.2f} of its floor"
    )
    return found


def transformers(run: Run, model: RandomModel, prefix: Tensor, load: Load) -> Found:
    """Questions a second of its own ways over the questions of one video."""
    ways = {
        "one_by_one": finished(lambda: one_by_one(model, prefix, load), run.device),
        "left_padded": finished(lambda: left_padded(model, prefix, load), run.device),
        "yes_or_no": finished(lambda: yes_or_no(model, prefix, load), run.device),
    }
    seconds = interleave(ways, 1)
    found = {name: len(load.questions) / median(took) for name, took in seconds.items()}
    run.say("transformers: " + ", ".join(f"{name} {rate:.2f}/s" for name, rate in found.items()))
    return found


def host_time(run: Run) -> Found:
    """Milliseconds of a step of 8 and of 64 rows, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = random_model(HOST_SHAPE, run.device, torch.float32, HOST_SHAPE.width)
        model.num_before = HOST_BEFORE
        tokens = TINY_HOST_TOKENS if run.is_tiny else HOST_TOKENS
        load = Load(question_tokens=(8,) * 8, answer_tokens=(tokens,) * 8, num_visual=HOST_VISUAL)
        engine = Engine(model, AnswerRecipe("random", "random", "random", max_new_tokens=tokens))
        prefixes = [torch.randn(HOST_VISUAL, HOST_SHAPE.width) for _ in range(8)]
        found = {}
        for num_videos in (1, 8):
            runs = [run_engine(engine, prefixes[:num_videos], (), load) for _ in range(2 if run.is_tiny else 4)]
            found[f"rows_{8 * num_videos}"] = min(s.decode_s / s.num_steps * 1e3 for s, _ in runs[1:])
    finally:
        torch.set_num_threads(threads)
    run.say(
        "host: " + ", ".join(f"{ms:.2f} ms a step of {name.removeprefix('rows_')} rows" for name, ms in found.items())
    )
    return found
