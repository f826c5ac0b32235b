"""Pre-train affina/nano from scratch on one GPU, in one sitting.

    python tools/nano/pretrain.py --text FOLDER --assets src/affina/catalog/assets/nano --output OUT --seconds 420

Beside the weights lie tokenizer and skill test: OUT is a model that affina trains. `--shape small` makes a larger one.

Books (loss on every token) and generated tasks (loss on replies only) share each batch. Rows have 1,024 tokens; the
conversations in a row do not see each other. Muon moves the hidden matrices and AdamW the embedding and the norms:
on a budget of minutes Muon reaches a given loss in clearly fewer tokens than AdamW alone, and its Newton-Schulz
steps cost little on matrices this small. The learning rate warms up, stays, and falls linearly to zero over the last
part; the number of steps is fixed from the speed of the first ones, or by --steps, which makes a run repeatable.

Papers: Muon (Jordan et al. 2024), its scaling to AdamW's update size (Liu et al. 2025, arXiv:2502.16982), the
trapezoidal schedule (Hägele et al. 2024, arXiv:2405.18392), Qwen3's architecture (arXiv:2505.09388).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import re
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from chat import render
from corpus import HELD_OUT_EVERY, SOURCES, Work, read_works, sha256_of
from numpy.typing import NDArray
from skills import generate_replies, held_out_questions, read_items, score
from tasks import Sentences, examples
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, Qwen3Config, Qwen3ForCausalLM

ROW = 1024
IGNORED = -100
EMPTY_THINKING_SHARE = 0.12
SENTENCES_PER_LANGUAGE = 60_000
TASK_SHARDS = 32
"""Task generators with seeds of their own; fixed, so that the data does not depend on the number of workers."""
MODEL_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "skills.jsonl")
FINISHING_SECONDS = 10.0
"""Kept for the last evaluation and for saving."""


SHAPES: dict[str, dict[str, int]] = {
    "nano": {
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "intermediate_size": 640,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "small": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "intermediate_size": 2560,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
    },
}
"""nano: 6.2 M parameters, 2.1 M of them the tied embedding; small: 96 M, to measure methods on."""


def model_config(shape: str, eos_token_id: int, pad_token_id: int) -> Qwen3Config:
    """The architecture: every linear dimension a multiple of 64."""
    return Qwen3Config(
        vocab_size=8192,
        **SHAPES[shape],
        head_dim=64,
        max_position_embeddings=ROW,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )


# --- data -------------------------------------------------------------------------------------------------------------


def encode_work(tokenizer_file: str, work: Work) -> NDArray[np.int16]:
    """[n] token ids of a whole work."""
    tokenizer = Tokenizer.from_file(tokenizer_file)
    return np.array(tokenizer.encode(work.text).ids, dtype=np.int16)


def some_sentences(works: list[Work], seed: int) -> Sentences:
    """Sentences of 15 to 120 characters from the training works, for copying."""
    rng = random.Random(seed)
    found: Sentences = {"en": [], "it": []}
    for work in works:
        if not work.held_out:
            pieces = re.split(r"(?<=[.!?;:])\s+", work.text)
            found[work.language] += [piece for piece in pieces if 15 <= len(piece) <= 120]
    return {
        language: rng.sample(pieces, min(SENTENCES_PER_LANGUAGE, len(pieces))) for language, pieces in found.items()
    }


def task_rows(
    tokenizer_file: str, seed: int, count: int, sentences: Sentences, forbidden: frozenset[str]
) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """`count` conversations as rows: ids [R, ROW] and marks [R, ROW].

    A mark is the conversation's number in its row, counted from 1, negative where the token is trained, 0 in padding.
    Conversations fill a row in the order in which they come; one that does not fit begins the next row.
    """
    tokenizer = Tokenizer.from_file(tokenizer_file)
    rng = random.Random(seed)
    stream = examples(rng, sentences)
    ids = np.zeros((count * 200 // ROW + 2, ROW), dtype=np.int16)
    marks = np.zeros_like(ids)
    row, column, number = 0, 0, 1
    done = 0
    while done < count:
        chosen = []
        while len(chosen) < min(2000, count - done):
            example = next(stream)
            if not any(message["content"] in forbidden for message in example.messages):
                chosen.append(render(example, empty_thinking=rng.random() < EMPTY_THINKING_SHARE))
        done += len(chosen)
        encoded = iter(tokenizer.encode_batch([segment.text for segments in chosen for segment in segments]))
        for segments in chosen:
            pieces = [(next(encoded).ids, segment.trained) for segment in segments]
            length = sum(len(piece) for piece, _ in pieces)
            if length > ROW:
                continue
            if column + length > ROW:
                row, column, number = row + 1, 0, 1
            for piece, trained in pieces:
                ids[row, column : column + len(piece)] = piece
                marks[row, column : column + len(piece)] = -number if trained else number
                column += len(piece)
            number += 1
    return ids[: row + 1], marks[: row + 1]


class Data:
    """Everything on the device: token streams of the books and packed rows of tasks; draws batches by seed."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        started = time.time()
        tokenizer_file = str(arguments.assets / "tokenizer.json")
        works = list(read_works(arguments.text, is_sample=arguments.sample))
        if arguments.max_works:
            held_out = [work for work in works if work.held_out]
            works = held_out[-1:] + held_out[:1] + works[: arguments.max_works] + works[-1:]
        sentences = some_sentences(works, arguments.seed)
        forbidden = held_out_questions(read_items(arguments.assets / "skills.jsonl"))
        workers = min(arguments.workers, os.cpu_count() or 1)
        shard = math.ceil(arguments.task_examples / TASK_SHARDS)
        with ProcessPoolExecutor(workers) as pool:
            text = [pool.submit(encode_work, tokenizer_file, work) for work in works]
            seeds = [arguments.seed * 1_000_003 + index + 1 for index in range(TASK_SHARDS)]
            tasks = [pool.submit(task_rows, tokenizer_file, seed, shard, sentences, forbidden) for seed in seeds]
            encoded = [future.result() for future in text]
            rows = [future.result() for future in tasks]
        self.device = device
        self.books = {
            (language, held_out): torch.from_numpy(
                np.concatenate(
                    [
                        ids
                        for ids, work in zip(encoded, works, strict=True)
                        if (work.language, work.held_out) == (language, held_out)
                    ]
                )
            ).to(device)
            for language in ("en", "it")
            for held_out in (False, True)
        }
        self.task_ids = torch.from_numpy(np.concatenate([ids for ids, _ in rows])).to(device)
        self.task_marks = torch.from_numpy(np.concatenate([marks for _, marks in rows])).to(device)
        self.generator = torch.Generator(device).manual_seed(arguments.seed)
        self.order = torch.randperm(len(self.task_ids), generator=self.generator, device=device)
        self.next_task = 0
        self.seconds = time.time() - started

    def summary(self) -> dict[str, int | float]:
        return {
            "text_tokens_en": len(self.books["en", False]),
            "text_tokens_it": len(self.books["it", False]),
            "held_out_tokens_en": len(self.books["en", True]),
            "held_out_tokens_it": len(self.books["it", True]),
            "task_rows": len(self.task_ids),
            "task_tokens": int((self.task_marks != 0).sum()),
            "task_tokens_trained": int((self.task_marks < 0).sum()),
            "preparation_seconds": round(self.seconds, 1),
        }

    def book_rows(self, language: str, starts: Tensor, *, held_out: bool = False) -> Tensor:
        """[n, ROW] int64 windows of the book stream that begin at `starts` [n]."""
        offsets = starts[:, None] + torch.arange(ROW, device=self.device)
        return self.books[language, held_out][offsets].long()

    def batch(self, rows: int, task_share: float, italian_share: float) -> tuple[Tensor, Tensor]:
        """(ids, marks), each [rows, ROW] int64: tasks first, then English, then Italian."""
        num_tasks = round(rows * task_share)
        num_italian = round((rows - num_tasks) * italian_share)
        if self.next_task + num_tasks > len(self.order):
            self.order = torch.randperm(len(self.task_ids), generator=self.generator, device=self.device)
            self.next_task = 0
        chosen = self.order[self.next_task : self.next_task + num_tasks]
        self.next_task += num_tasks
        ids, marks = [self.task_ids[chosen].long()], [self.task_marks[chosen].long()]
        for language, count in (("en", rows - num_tasks - num_italian), ("it", num_italian)):
            limit = len(self.books[language, False]) - ROW
            starts = torch.randint(limit, (count,), generator=self.generator, device=self.device)
            ids.append(self.book_rows(language, starts))
            marks.append(torch.full((count, ROW), -1, device=self.device))
        return torch.cat(ids), torch.cat(marks)


# --- model ------------------------------------------------------------------------------------------------------------


def reply_loss(model: Qwen3ForCausalLM, ids: Tensor, marks: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of cross-entropies, number of trained tokens) of a batch.

    ids, marks: [B, ROW] int64; a token attends to earlier tokens of its own conversation only
    """
    numbers = marks.abs()
    position = torch.arange(ids.shape[1], device=ids.device)
    mask = (numbers[:, :, None] == numbers[:, None, :]) & (position[:, None] >= position[None, :])
    hidden = model.model(
        input_ids=ids, attention_mask={"full_attention": mask[:, None]}, use_cache=False
    ).last_hidden_state
    trained = (marks[:, 1:] < 0) & (numbers[:, 1:] == numbers[:, :-1])
    targets = torch.where(trained, ids[:, 1:], IGNORED)
    logits = F.linear(hidden[:, :-1], model.lm_head.weight)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return loss, trained.sum()


def new_optimizers(model: Qwen3ForCausalLM, arguments: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the tied embedding (decayed) and the norms (not decayed)."""
    layers = list(model.model.layers.parameters())
    matrices = [parameter for parameter in layers if parameter.ndim == 2]
    vectors = [parameter for parameter in layers if parameter.ndim == 1] + [model.model.norm.weight]
    muon = torch.optim.Muon(
        matrices, lr=arguments.muon_rate, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(
        [
            {"params": [model.model.embed_tokens.weight], "weight_decay": 0.05},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=arguments.adamw_rate,
        betas=(0.9, 0.95),
    )
    optimizers: list[torch.optim.Optimizer] = [muon, adamw]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def rate_factor(step: int, total: int, *, warmup: int, decay_share: float) -> float:
    """Share of the peak learning rate at `step` of `total`: linear rise, plateau, linear fall to zero."""
    fall = max(1, round(total * decay_share))
    return max(0.0, min(1.0, (step + 1) / warmup, (total - step) / fall))


@torch.no_grad()
def perplexity(model: Qwen3ForCausalLM, data: Data, language: str, *, rows: int) -> float:
    """Perplexity per token on up to `rows` evenly spaced windows of the held-out works."""
    available = (len(data.books[language, True]) - 1) // ROW
    starts = torch.linspace(0, (available - 1) * ROW, min(rows, available), device=data.device).long()
    total, count = 0.0, 0
    for part in starts.split(16):
        ids = data.book_rows(language, part, held_out=True)
        loss, trained = reply_loss(model, ids, torch.full_like(ids, -1))
        total, count = total + loss.item(), count + int(trained.item())
    return math.exp(total / count)


class Evaluation:
    """Held-out perplexity and base skills of the model as it is."""

    def __init__(self, model: Qwen3ForCausalLM, data: Data, arguments: argparse.Namespace) -> None:
        self.model, self.data, self.rows = model, data, arguments.evaluation_rows
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.assets)
        self.items = read_items(arguments.assets / "skills.jsonl")

    def perplexities(self) -> dict[str, float]:
        return {
            f"perplexity_{language}": round(perplexity(self.model, self.data, language, rows=self.rows), 3)
            for language in ("en", "it")
        }

    def skills(self) -> dict[str, float]:
        return score(self.items, generate_replies(self.model, self.tokenizer, self.items))


def save(model: Qwen3ForCausalLM, log: dict[str, Any], output: Path, assets: Path) -> None:
    """bf16 weights, config, log, tokenizer and skill test of `assets`; a later call overwrites an earlier one."""
    half = Qwen3ForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict({name: value.to("cpu", torch.bfloat16) for name, value in model.state_dict().items()})
    half.config.dtype = torch.bfloat16
    half.generation_config = GenerationConfig(
        eos_token_id=[model.config.eos_token_id, model.config.pad_token_id],
        pad_token_id=model.config.pad_token_id,
        do_sample=False,
    )
    half.save_pretrained(output)
    for name in MODEL_FILES:
        if (assets / name).resolve() != (output / name).resolve():
            shutil.copyfile(assets / name, output / name)
    (output / "training_log.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")


# --- training ---------------------------------------------------------------------------------------------------------


def new_log(arguments: argparse.Namespace, data: Data, parameters: int) -> dict[str, Any]:
    device = torch.cuda.get_device_name() if data.device.type == "cuda" else "cpu"
    return {
        "data": {
            name: {**source, "sha256": sha256_of(arguments.text / name), "is_sample": arguments.sample}
            for name, source in SOURCES.items()
        },
        "held_out": f"every {HELD_OUT_EVERY}th work of each prose file",
        "tokenizer_sha256": sha256_of(arguments.assets / "tokenizer.json"),
        "skills_sha256": sha256_of(arguments.assets / "skills.jsonl"),
        "arguments": {
            key: value for key, value in vars(arguments).items() if not isinstance(value, Path) and key != "workers"
        },
        "parameters": parameters,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "device": device,
        **data.summary(),
        "loss_curve": [],
        "evaluations": [],
    }


def train(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the whole pre-training and returns its log."""
    began = time.time()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    data = Data(arguments, device)
    tokenizer = AutoTokenizer.from_pretrained(arguments.assets)
    model = Qwen3ForCausalLM(model_config(arguments.shape, tokenizer.eos_token_id, tokenizer.pad_token_id)).to(device)
    log = new_log(arguments, data, sum(parameter.numel() for parameter in model.parameters()))
    print(json.dumps({key: log[key] for key in (*data.summary(), "parameters", "device", "versions")}), flush=True)
    evaluation = Evaluation(model, data, arguments)
    log["untrained"] = evaluation.perplexities()
    print(log["untrained"], flush=True)
    loss_of = torch.compile(reply_loss) if arguments.compile else reply_loss
    optimizers = new_optimizers(model, arguments)
    total = arguments.steps
    arguments.output.mkdir(parents=True, exist_ok=True)
    step, window, tokens = 0, torch.zeros(2, device=device), 0
    clock = time.time()
    next_save = clock + arguments.save_every
    evaluation_seconds = 0.0
    while total is None or step < total:
        if step == arguments.measured_from:
            _synchronise(device)
            clock = time.time()
        if total is None and step == arguments.measured_from + arguments.measured_steps:
            _synchronise(device)
            speed = (time.time() - clock) / arguments.measured_steps
            total = max(step + 1, step + int((arguments.seconds - FINISHING_SECONDS - (time.time() - began)) / speed))
            log["step_seconds"] = round(speed, 4)
            print(f"{speed:.4f} s/step, {arguments.rows * ROW / speed:,.0f} tokens/s, {total} steps", flush=True)
        horizon = total if total is not None else 10**9
        factor = rate_factor(step, horizon, warmup=arguments.warmup, decay_share=arguments.decay_share)
        ids, marks = data.batch(arguments.rows, arguments.task_share, arguments.italian_share)
        tokens += ids.numel()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss, count = loss_of(model, ids, marks)
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        window += torch.stack([loss.detach(), count.float()])
        step += 1
        if step % arguments.log_every == 0 or step == total:
            summed, counted = window.tolist()
            window.zero_()
            entry = {"step": step, "loss": round(summed / counted, 4), "rate": round(factor, 4), "tokens": tokens}
            log["loss_curve"].append({**entry, "seconds": round(time.time() - began, 1)})
            print(log["loss_curve"][-1], flush=True)
        if time.time() > next_save and step != total:
            before = time.time()
            log["evaluations"].append({"step": step, **evaluation.perplexities(), "skills": evaluation.skills()["all"]})
            print(log["evaluations"][-1], flush=True)
            save(model, log, arguments.output, arguments.assets)
            evaluation_seconds += time.time() - before
            next_save = time.time() + arguments.save_every
            if arguments.steps is None and total is not None:
                # The time that looking took is taken from the steps that have not yet begun to slow down.
                total = max(step + 1, total - int((time.time() - before) / log["step_seconds"]))
    skills = evaluation.skills()
    log["final"] = {"steps": step, "tokens": tokens, **evaluation.perplexities(), "skills": skills}
    log["training_seconds"] = round(time.time() - began, 1)
    save(model, log, arguments.output, arguments.assets)
    print(json.dumps(log["final"]), flush=True)
    return log


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def parse(command: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="folder with the files that corpus.py names")
    parser.add_argument("--assets", type=Path, required=True, help="folder with the tokenizer and skills.jsonl")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--seconds", type=float, default=420.0, help="length of the run from its start, saving included"
    )
    parser.add_argument("--steps", type=int, help="fixed number of steps instead of --seconds")
    parser.add_argument("--task-examples", type=int, default=3_000_000)
    parser.add_argument("--rows", type=int, default=96, help=f"rows of {ROW} tokens in a step")
    parser.add_argument("--task-share", type=float, default=0.7, help="share of the rows that hold tasks")
    parser.add_argument("--italian-share", type=float, default=0.4, help="share of the other rows that is Italian")
    parser.add_argument("--muon-rate", type=float, default=5e-3)
    parser.add_argument("--adamw-rate", type=float, default=4e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--decay-share", type=float, default=0.45)
    parser.add_argument("--measured-from", type=int, default=20, help="first step whose speed is measured")
    parser.add_argument("--measured-steps", type=int, default=60)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--save-every", type=float, default=100.0, help="seconds between evaluations with saving")
    parser.add_argument("--evaluation-rows", type=int, default=128)
    parser.add_argument("--shape", choices=list(SHAPES), default="nano")
    parser.add_argument("--sample", action="store_true", help="the text is a sample that corpus.py wrote")
    parser.add_argument("--max-works", type=int, help="only so many works, to try the script")
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(command)


if __name__ == "__main__":
    train(parse())
