"""Trains the demo model on a CPU: `python -m engine.demo.train`.

Owns the run from the seed to the exported files: worker processes with one thread each share parameters
and gradients, take micro-batches from a common counter, and step a shard of the parameters each (Muon for
matrices, Adam for the rest). Resumes from its last checkpoint and exports after every evaluation.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from engine.demo.corpus import HERE
from engine.demo.data import CLOSE, END, PRACTICE, Shard, load_tokenizer, prepare, write_tokenizer
from engine.demo.model import Shape, forward, init_flat, rotations, views

LONG = 2048  # tokens of a packed sequence
UNIT = 1024  # tokens of a micro-batch of documents
DOCUMENTS, PACK, DRILL, EXTRA = 0, 1, 2, 3
STOP = -1
PATIENCE = 900.0  # seconds after which a worker that waits for a dead one gives up


@dataclass
class Options:
    """The flags of a run."""

    minutes: float = 60.0
    steps: int = 0
    out: Path = HERE
    work: Path = Path(".demo-train")
    seed: int = 1
    tokens: int = 13_000_000
    shards: int = 4
    workers: int = 2
    batch: int = 2
    lr: float = 0.02
    adam_lr: float = 0.004
    decay_from: float = 0.55
    eval_minutes: float = 8.0
    fresh: bool = False


def options() -> Options:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Options()
    parser.add_argument("--minutes", type=float, default=default.minutes, help="training time, without preparation")
    parser.add_argument("--steps", type=int, default=0, help="train this many steps instead of a time")
    parser.add_argument("--out", type=Path, default=default.out, help="folder for the exported model")
    parser.add_argument("--work", type=Path, default=default.work, help="folder for tokens and checkpoints")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--tokens", type=int, default=default.tokens, help="tokens of training text to generate")
    parser.add_argument("--shards", type=int, default=default.shards, help="files the training text is kept in")
    parser.add_argument("--workers", type=int, default=default.workers, help="processes with one thread each")
    parser.add_argument("--batch", type=int, default=default.batch, help=f"micro-batches of {UNIT} tokens per step")
    parser.add_argument("--lr", type=float, default=default.lr, help="learning rate of the matrices (Muon)")
    parser.add_argument("--adam-lr", type=float, default=default.adam_lr, help="learning rate of the rest (Adam)")
    parser.add_argument(
        "--decay-from", type=float, default=default.decay_from, help="share of the run before the decay"
    )
    parser.add_argument("--eval-minutes", type=float, default=default.eval_minutes)
    parser.add_argument("--fresh", action="store_true", help="ignore an earlier checkpoint")
    return Options(**vars(parser.parse_args()))


# ---------------------------------------------------------------------------------------- optimiser


def orthogonal(g: Tensor, rounds: int = 5) -> Tensor:
    """The nearest matrix with equal singular values, roughly, by Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / (x.norm() + 1e-7)
    for _ in range(rounds):
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return x.T if g.shape[0] > g.shape[1] else x


class ShardedOptimizer:
    """Steps the parameters one worker is responsible for; its state lives in shared memory."""

    def __init__(self, shape: Shape, flat: Tensor, first: Tensor, second: Tensor, rank: int, world: int) -> None:
        self.p, self.m, self.v = (views(t, shape) for t in (flat, first, second))
        load = [0.0] * world
        self.mine: list[str] = []
        cost = {n: p.numel() * (min(p.shape) if p.dim() == 2 and "embed" not in n else 8) for n, p in self.p.items()}
        for name in sorted(cost, key=cost.__getitem__, reverse=True):  # even work for every worker
            to = load.index(min(load))
            load[to] += cost[name]
            if to == rank:
                self.mine.append(name)

    def step(self, grads: dict[str, Tensor], step: int, lr: float, adam_lr: float) -> None:
        """One update; `grads` is already averaged and clipped."""
        for name in self.mine:
            p, g, m = self.p[name], grads[name], self.m[name]
            if p.dim() == 2 and "embed" not in name:
                m.mul_(0.95).add_(g, alpha=0.05)
                update = orthogonal(g.lerp(m, 0.95))
                p.mul_(1 - lr * 0.05)
                p.add_(update, alpha=-lr * math.sqrt(max(1.0, p.shape[0] / p.shape[1])))
            else:
                v = self.v[name]
                m.lerp_(g, 0.1)
                v.lerp_(g * g, 0.02)
                rate = adam_lr * math.sqrt(1 - 0.98**step) / (1 - 0.9**step)
                p.addcdiv_(m, v.sqrt().add_(1e-10), value=-rate * (1.0 if p.dim() == 2 else 0.5))


# ------------------------------------------------------------------------------------------ workers


class Shared:
    """What the processes share: tensors, the micro-batch counter, and barriers."""

    def __init__(self, shape: Shape, seed: int, workers: int, context: Any) -> None:
        self.shape = shape
        self.flat = init_flat(shape, seed).share_memory_()
        self.first = torch.zeros_like(self.flat).share_memory_()
        self.second = torch.zeros_like(self.flat).share_memory_()
        self.grads = [torch.zeros_like(self.flat).share_memory_() for _ in range(workers)]
        self.loss = torch.zeros(workers, 3, dtype=torch.float64).share_memory_()
        self.plan = torch.zeros(64, 2, dtype=torch.int64).share_memory_()  # position and kind of each micro-batch
        self.rates = torch.zeros(3, dtype=torch.float64).share_memory_()
        self.items = context.Value("i", 0)
        self.counter = context.Value("i", 0)
        self.begin, self.computed, self.stepped = (context.Barrier(workers) for _ in range(3))


class Source:
    """The micro-batches of the run, in a fixed shuffled order."""

    def __init__(self, work: Path, shards: int, seed: int) -> None:
        self.shards = [Shard.open(work / f"train{i}") for i in range(shards)]
        rng = np.random.default_rng(seed)
        self.practice = Shard.open(work / PRACTICE)
        self.extra = self.practice.batches(np.random.default_rng(seed + 1), UNIT)
        self.batches = [(i, b) for i, s in enumerate(self.shards) for b in s.batches(rng, UNIT)]
        windows = [(i, w) for i, s in enumerate(self.shards) for w in s.windows(LONG)]
        self.windows = [windows[i] for i in rng.permutation(len(windows))]

    def micro(self, at: int, kind: int) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, targets and weights: documents on their own, a packed long sequence, or a copy drill."""
        if kind == DRILL:
            return drill(at)
        if kind == PACK:
            shard, start = self.windows[at % len(self.windows)]
            rows = self.shards[shard].rows(np.asarray([[start, LONG + 1]]))
        elif kind == EXTRA:
            rows = self.practice.rows(self.extra[at % len(self.extra)])
        else:
            shard, spans = self.batches[at % len(self.batches)]
            rows = self.shards[shard].rows(spans)
        x, y, w = (torch.from_numpy(np.ascontiguousarray(part)) for part in rows)
        return x, y, w


def drill(at: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random tokens said twice: the shortest way to attention heads that copy, which every task needs."""
    g = torch.Generator().manual_seed(at)
    length = int(torch.randint(8, 32, (1,), generator=g))
    half = torch.randint(3, Shape().vocab, (UNIT // (2 * length), length), generator=g)
    ids = torch.cat((half, half), dim=1)
    weights = torch.zeros(ids.shape)
    weights[:, length + 1 :] = 1.0
    return ids[:, :-1], ids[:, 1:], weights[:, 1:]


def token_loss(p: dict[str, Tensor], shape: Shape, x: Tensor, y: Tensor, w: Tensor, rope: Any) -> tuple[Tensor, Tensor]:
    """The weighted sum of token losses and the sum of the weights."""
    h = forward(p, shape, x, rope).flatten(0, 1)
    loss = F.cross_entropy(F.linear(h, p["model.embed_tokens.weight"]), y.flatten(), reduction="none")
    return (loss * w.flatten()).sum(), w.sum()


class Worker:
    """One process's part of a step."""

    def __init__(self, rank: int, world: int, shared: Shared, source: Source) -> None:
        torch.set_num_threads(1)
        self.rank, self.shared, self.source = rank, shared, source
        self.params = {n: v.detach().requires_grad_() for n, v in views(shared.flat, shared.shape).items()}
        self.grad = views(shared.grads[rank], shared.shape)
        for name, p in self.params.items():
            p.grad = self.grad[name]
        self.rope = rotations(shared.shape, LONG)
        self.optimizer = ShardedOptimizer(shared.shape, shared.flat, shared.first, shared.second, rank, world)
        self.steps = 0

    def work(self) -> None:
        """Micro-batches until none is left, then the update of this worker's shard of the parameters."""
        s = self.shared
        s.grads[self.rank].zero_()
        s.loss[self.rank].zero_()
        while True:
            with s.counter.get_lock():
                item = s.counter.value
                s.counter.value += 1
            if item >= s.items.value:
                break
            x, y, w = self.source.micro(*s.plan[item].tolist())
            loss, weight = token_loss(self.params, s.shape, x, y, w, self.rope)
            (loss / UNIT).backward()
            s.loss[self.rank] += torch.stack([loss.detach(), weight, (w > 0).sum()]).double()
        s.computed.wait(PATIENCE)
        lr, adam_lr, step = s.rates.tolist()
        scale = UNIT / float(s.loss[:, 1].sum())
        with torch.no_grad():
            grads: dict[str, Tensor] = {}
            all_views = [views(g, s.shape) for g in s.grads]
            for name in self.optimizer.mine:
                g = all_views[0][name].clone()
                for other in all_views[1:]:
                    g += other[name]
                grads[name] = g * scale
            self.optimizer.step(grads, int(step), lr, adam_lr)
        s.stepped.wait(PATIENCE)


def worker_main(rank: int, world: int, shared: Shared, work: Path, shards: int, seed: int) -> None:
    """The loop of a helper process."""
    worker = Worker(rank, world, shared, Source(work, shards, seed))
    while True:
        shared.begin.wait(PATIENCE)
        if shared.items.value == STOP:
            return
        worker.work()


# ------------------------------------------------------------------------------- evaluation, export


@torch.no_grad()
def held_out_loss(p: dict[str, Tensor], shape: Shape, shard: Shard, count: int) -> tuple[float, float]:
    """The mean loss per answer token, and per token, of batches of held-out documents."""
    rope = rotations(shape, LONG)
    total = torch.zeros(4, dtype=torch.float64)
    for spans in shard.batches(np.random.default_rng(0), UNIT)[:count]:
        x, y, w = (torch.from_numpy(np.ascontiguousarray(a)) for a in shard.rows(spans))
        h = forward(p, shape, x, rope).flatten(0, 1)
        loss = F.cross_entropy(F.linear(h, p["model.embed_tokens.weight"]), y.flatten(), reduction="none").double()
        answer, real = (w.flatten() == 1.0).double(), (w.flatten() > 0).double()
        total += torch.stack([(loss * answer).sum(), answer.sum(), (loss * real).sum(), real.sum()])
    return float(total[0] / total[1]), float(total[2] / total[3])


def export(flat: Tensor, shape: Shape, out: Path) -> None:
    """Write the Hugging Face files; each is replaced at once, so a reader never sees half a file."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer()
    close, end = tokenizer.token_to_id(CLOSE), tokenizer.token_to_id(END)
    tensors = {n: t.to(torch.bfloat16).contiguous().clone() for n, t in views(flat, shape).items()}
    temporary = out / "model.safetensors.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.chmod(0o644)
    temporary.replace(out / "model.safetensors")
    generation = {
        "bos_token_id": None,
        "eos_token_id": [close, end],
        "pad_token_id": end,
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.9,
        "max_new_tokens": 256,
    }
    for name, value in (
        ("config.json", shape.config(None, close, end)),
        ("generation_config.json", generation),
    ):
        temporary = out / (name + ".tmp")
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        temporary.replace(out / name)
    if out.resolve() != HERE.resolve():
        write_tokenizer(tokenizer, out)
        (out / "chat_template.jinja").write_text((HERE / "chat_template.jinja").read_text("utf-8"), "utf-8")


def plot(log: dict[str, list[list[float]]], path: Path) -> None:
    """The loss curve; left out where matplotlib, a development dependency, is not installed."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5))
    train = np.asarray(log["train"])
    axes.plot(train[:, 0] / 1e6, train[:, 1], lw=0.8, alpha=0.6, label="training (weighted)")
    if log["heldout"]:
        held = np.asarray(log["heldout"])
        axes.plot(held[:, 0] / 1e6, held[:, 1], "o-", ms=3, label="held-out, answers")
        axes.plot(held[:, 0] / 1e6, held[:, 2], "s--", ms=3, label="held-out, all tokens")
    axes.set(xlabel="million tokens seen", ylabel="loss (nats per token)", yscale="log", title="oneloop demo model")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------- run


def schedule(share: float, decay_from: float) -> float:
    """The learning-rate factor: warm-up, constant, then linear to nearly nothing."""
    if share < 0.02:
        return 0.1 + 0.9 * share / 0.02
    return 1.0 if share < decay_from else max(0.01, (1.0 - share) / (1.0 - decay_from))


def plan_step(share: float, step: int, batch: int, state: dict[str, Any]) -> list[list[int]]:
    """The micro-batches of a step: documents, with copy drills early and long sequences late."""
    plan = []
    if share > 0.6 and step % 8 == 0:
        # In addition, and first: the last micro-batches of a step should be small, so that none waits long.
        plan.append([state["packs"], PACK])
        state["packs"] += 1
    if share < 0.15:
        plan.append([step, DRILL])
    elif share > 0.86:
        plan.append([step, EXTRA])
    for _ in range(batch - sum(kind != PACK for _, kind in plan)):
        plan.append([state["documents"], DOCUMENTS])
        state["documents"] += 1
    return plan


def main() -> None:
    """Train, evaluate and export."""
    o = options()
    shape = Shape()
    began = time.monotonic()
    prepare(o.work, o.seed, o.tokens, o.shards, o.workers)
    print(f"prepared in {time.monotonic() - began:.0f} s; {shape.size():,} parameters", flush=True)
    context = mp.get_context("spawn")
    shared = Shared(shape, o.seed, o.workers, context)
    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "tokens": 0, "documents": 0, "packs": 0}
    log: dict[str, list[list[float]]] = {"train": [], "heldout": []}
    saved = o.work / "checkpoint.pt"
    if saved.exists() and not o.fresh:
        old = torch.load(saved, weights_only=True)
        for name in ("flat", "first", "second"):
            getattr(shared, name).copy_(old[name])
        state, log = old["state"], old["log"]
        print(f"resumed at step {state['step']}", flush=True)

    def save() -> None:
        whole = {n: getattr(shared, n) for n in ("flat", "first", "second")} | {"state": state, "log": log}
        torch.save(whole, saved.with_suffix(".tmp"))
        saved.with_suffix(".tmp").replace(saved)

    arguments = (o.workers, shared, o.work, o.shards, o.seed)
    helpers = [context.Process(target=worker_main, args=(i, *arguments), daemon=True) for i in range(1, o.workers)]
    for process in helpers:
        process.start()
    source = Source(o.work, o.shards, o.seed)
    worker = Worker(0, o.workers, shared, source)
    held = Shard.open(o.work / "heldout")

    def evaluate(count: int) -> None:
        answers, every = held_out_loss(worker.params, shape, held, count)
        log["heldout"].append([state["tokens"], answers, every])
        export(shared.flat, shape, o.out)
        save()
        (o.out / "training.json").write_text(
            json.dumps(
                {
                    "parameters": shape.size(),
                    "shape": asdict(shape),
                    "seed": o.seed,
                    "steps": state["step"],
                    "tokens": state["tokens"],
                    "minutes": round(state["seconds"] / 60, 1),
                    "workers": o.workers,
                    "held_out_loss_answers": round(answers, 4),
                    "held_out_loss_all": round(every, 4),
                },
                indent=2,
            )
            + "\n",
            encoding="utf-8",
        )
        plot(log, o.out / "loss.png")
        tqdm.write(
            f"[{state['seconds'] / 60:.1f} min] step {state['step']} tokens {state['tokens'] / 1e6:.2f}M "
            f"held-out answers {answers:.4f} all {every:.4f}"
        )

    budget = o.minutes * 60
    bar = tqdm(total=100.0, unit="%", bar_format="{l_bar}{bar}| {elapsed}<{remaining} {postfix}", mininterval=10)
    last_eval = last_save = state["seconds"]
    if not state["step"]:
        last_eval -= o.eval_minutes * 40  # the first export comes early
    mark = time.monotonic()
    mean = 0.0
    while True:
        share = state["step"] / o.steps if o.steps else state["seconds"] / budget
        if share >= 1.0:
            break
        plan = plan_step(share, state["step"], o.batch, state)
        shared.plan[: len(plan)] = torch.tensor(plan)
        state["step"] += 1
        factor = schedule(share, o.decay_from)
        shared.rates.copy_(torch.tensor([o.lr * factor, o.adam_lr * factor, state["step"]], dtype=torch.float64))
        shared.counter.value = 0
        shared.items.value = len(plan)
        shared.begin.wait(PATIENCE)
        worker.work()
        state["tokens"] += int(shared.loss[:, 2].sum())
        loss = float(shared.loss[:, 0].sum() / shared.loss[:, 1].sum())
        log["train"].append([state["tokens"], loss])
        mean = loss if mean == 0.0 else 0.95 * mean + 0.05 * loss
        now = time.monotonic()
        state["seconds"] += now - mark
        mark = now
        bar.update(min(share * 100, 100) - bar.n)
        speed = state["tokens"] / state["seconds"]
        bar.set_postfix_str(f"step {state['step']} loss {mean:.3f} {speed:.0f} tok/s", refresh=False)
        if state["seconds"] - last_eval > o.eval_minutes * 60:
            last_eval = last_save = state["seconds"]
            evaluate(40)
            mark = time.monotonic()
        elif state["seconds"] - last_save > 180:
            last_save = state["seconds"]
            save()
    shared.items.value = STOP
    shared.begin.wait(PATIENCE)
    bar.close()
    evaluate(80)
    for process in helpers:
        process.join()


if __name__ == "__main__":
    main()
