"""The proof on a GPU: one command, its results as JSON lines as they come, over by itself after 9 minutes.

    python benchmarks/gpu/prove.py                 on a machine with a CUDA GPU; needs no network
    python benchmarks/gpu/prove.py --rehearse      the same on the CPU, with small shapes

The parts run one after the other in processes of their own kind (ComfyUI's, a later ComfyUI's, the engine's), the most
important first. A part that raises costs only itself; one that hangs or takes its process down costs that process, and
the next part gets a new one. What a machine lacks comes from the kit that pack.sh makes.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]
KIT = ROOT / ".gpu" / "kit.tar.gz"
MARGIN = 0.03
"""The share of the time, at its end, in which nothing new begins."""


@dataclass(frozen=True)
class Part:
    """One part. group: which kind of process it runs in; seconds: that it may take at most, its process's start left
    out."""

    name: str
    group: str
    seconds: float


PARTS = (
    Part("fp16", "comfy", 110),
    Part("fp8", "comfy", 60),
    Part("scaled-fp8", "comfy", 60),
    Part("widths", "comfy", 70),
    Part("fp16", "newer-dynamic", 100),
    Part("rates", "engine", 20),
    Part("failing", "engine", 1),
    Part("hanging", "engine", 0.2),
    Part("racing", "engine", 130),
    Part("python", "engine", 45),
    Part("exact", "engine", 50),
    Part("streamed", "engine", 60),
    Part("standins", "engine", 60),
    Part("oom", "engine", 45),
    Part("in-part", "comfy", 60),
    Part("fp8", "newer", 60),
    Part("streamed-8gb", "engine", 40),
    Part("nccl", "engine", 60),
    Part("precision", "engine", 60),
    Part("nodes", "comfy", 60),
    Part("in-part", "newer-dynamic", 60),
    Part("klein", "newer", 80),
)
"""In the order in which they run. `failing` and `hanging`, which run only when asked for, show that a part costs only
itself."""

START = 150
"""Seconds that a process's start may take, imports and all."""


def chosen(names: str | None) -> list[Part]:
    """The parts asked for, as `name` or `group:name`; by default all real ones."""
    if not names:
        return [part for part in PARTS if part.name not in ("failing", "hanging")]
    wanted = names.split(",")
    found = [part for part in PARTS if {part.name, f"{part.group}:{part.name}"} & set(wanted)]
    known = {n for part in PARTS for n in (part.name, f"{part.group}:{part.name}")}
    if unknown := [name for name in wanted if name not in known]:
        raise SystemExit(f"there is no part {unknown[0]}: choose of {', '.join(sorted(known))}")
    return found


class Places:
    """Where the pieces are. site: packages that this machine may lack; comfy, newer: ComfyUI's folders, or None."""

    def __init__(self, options):
        self.folder = Path(tempfile.mkdtemp(prefix="skrr-gpu-"))
        self.site = self.comfy = self.newer = None
        if options.kit.is_file():
            with tarfile.open(options.kit) as kit:
                kit.extractall(self.folder, filter="data")
            matching = f"{sys.version_info[0]}.{sys.version_info[1]}"
            if (self.folder / "python").read_text().strip() == matching:
                self.site = self.folder / "site"
            else:
                print(f"the kit's wheels are for another Python than {matching}: left out", file=sys.stderr)
            self.comfy, self.newer = (self._there(self.folder / name) for name in ("comfyui", "comfyui-newer"))
        self.comfy = options.comfyui or self.comfy or self._there(ROOT / ".cache" / "comfyui")
        self.newer = options.newer or self.newer

    @staticmethod
    def _there(path: Path) -> Path | None:
        return path if (path / "nodes.py").is_file() else None

    def of(self, group: str) -> Path | None:
        return self.newer if group.startswith("newer") else self.comfy

    def clean(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class Results:
    """Lines as they come: to stdout, to `path`, and to $OUT where that is set."""

    def __init__(self, folder: Path, append: bool):
        self.folder, self.append = folder, append
        self.lines, self.name, self.start = [], None, time.monotonic()
        self.out = Path(os.environ["OUT"]) if os.environ.get("OUT") else None
        for place in filter(None, (self.folder, self.out)):
            place.mkdir(parents=True, exist_ok=True)

    def add(self, line: dict) -> None:
        """Write a line. The first one with `card` names the file; what came before it is in it, too."""
        line = {"at_s": round(time.monotonic() - self.start, 1), **line}
        print(json.dumps(line), flush=True)
        self.lines.append(line)
        first = self.name is None and "card" in line
        if first:
            self.name = "".join(c if c.isalnum() else "-" for c in line["card"].lower()).strip("-") + ".jsonl"
        if self.name is None:
            return
        for place in filter(None, (self.folder, self.out)):
            with open(place / self.name, "w" if first and not self.append else "a", encoding="utf-8") as file:
                file.writelines(json.dumps(entry) + "\n" for entry in (self.lines if first else [line]))


class Child:
    """A process that runs parts of one group. lines: what it prints, then None."""

    def __init__(self, group: str, parts: Sequence[Part], places: Places, options, out: Path):
        command = [sys.executable, "-u", str(Path(__file__).resolve()), "--child", group]
        command += ["--parts", ",".join(f"{part.name}={part.seconds}" for part in parts), "--out", str(out)]
        command += ["--rehearse"] if options.rehearse else []
        root = places.of(group)
        command += ["--comfyui", str(root)] if root is not None else []
        paths = [str(p) for p in (places.site, ROOT) if p is not None] + [os.environ.get("PYTHONPATH", "")]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
        env |= {"SKRR_GPU_RUN": str(os.getpid()), "PYTHONDONTWRITEBYTECODE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self.log, text=True, env=env, cwd=ROOT,
            start_new_session=True,
        )  # fmt: skip
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def next(self, seconds: float) -> dict | None:
        """Its next line; None where it has ended. Raises queue.Empty after so many seconds."""
        until = time.monotonic() + seconds
        while True:
            line = self.lines.get(timeout=max(until - time.monotonic(), 0.01))
            if line is None:
                return None
            if line.startswith("{"):
                try:
                    return json.loads(line)
                except ValueError:
                    pass
            self.log.write(line)

    def end(self) -> str:
        """Stop it, and what it has started; the end of what it said."""
        import signal

        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        self.log.seek(0)
        return self.log.read()[-3000:]


def run_group(group: str, parts: list[Part], places: Places, options, results: Results, deadline: float) -> None:
    """Run parts of one group, in as many processes as it takes."""
    parts, last = list(parts), deadline - MARGIN * options.minutes * 60
    while parts and time.monotonic() < last:
        child = Child(group, parts, places, options, results.out or results.folder)
        current, limit, problem, up = None, time.monotonic() + START, "", False
        try:
            while True:
                line = child.next(min(limit, deadline) - time.monotonic())
                if line is None:
                    problem = "its process ended" if current or parts else ""
                    break
                if "begin" in line:
                    up = True
                    current = next(part for part in parts if part.name == line["begin"])
                    limit = time.monotonic() + current.seconds * (1 if not options.rehearse else 4) + 5
                elif "end" in line:
                    parts.remove(current)
                    results.add({"part": f"{group}:{current.name}", "ended_s": line["end"]})
                    current, limit = None, time.monotonic() + START
                    if not parts:
                        break
                else:
                    results.add({"part": f"{group}:{current.name}", **line} if current else {"part": group, **line})
        except queue.Empty:
            problem = "the proof's time was over" if time.monotonic() >= deadline else "it took too long"
        said = child.end()
        if problem:  # a process that does not come up would not come up for the next part either
            for victim in [current or parts[0]] if up else list(parts):
                results.add({"part": f"{group}:{victim.name}", "error": problem, "said": said})
                parts.remove(victim)


def waves(parts: Sequence[Part]) -> Iterator[tuple[str, list[Part]]]:
    """The parts as runs of one group, in their order."""
    run: list[Part] = []
    for part in parts:
        if run and run[-1].group != part.group:
            yield run[-1].group, run
            run = []
        run.append(part)
    if run:
        yield run[-1].group, run


def parent(options) -> int:
    """Run everything; 0 where no part failed."""
    results, places = Results(options.results, options.append), Places(options)
    deadline = results.start + options.minutes * 60
    try:
        for group, parts in waves(chosen(options.parts)):
            if group != "engine" and places.of(group) is None:
                for part in parts:
                    results.add({"part": f"{group}:{part.name}", "skipped": "no such ComfyUI in the kit"})
                continue
            run_group(group, parts, places, options, results, deadline)
        done = {line["part"] for line in results.lines if "part" in line}
        for part in chosen(options.parts):
            if f"{part.group}:{part.name}" not in done:
                results.add({"part": f"{part.group}:{part.name}", "skipped": "no time was left"})
        failed = [line["part"] for line in results.lines if "error" in line]
        results.add({"over": True, "failed": failed, "targets": summary(results.lines)})
    finally:
        places.clean()
        for place in ("/dev/shm", tempfile.gettempdir()):
            shutil.rmtree(Path(place) / f"skrr-gpu-{os.getpid()}", ignore_errors=True)
    told(results.lines)
    return 1 if failed else 0


def summary(lines: Sequence[Mapping]) -> dict[str, int]:
    """How many targets are met and missed."""
    found = [t["met"] for line in lines for t in line.get("targets", []) if isinstance(t, dict)]
    return {"met": sum(met is True for met in found), "missed": sum(met is False for met in found)}


def told(lines: Sequence[Mapping]) -> None:
    """The targets, last, where a long output's end is what is seen."""
    for line in lines:
        for t in line.get("targets", []):
            if isinstance(t, dict) and "name" in t:
                word = {True: "met", False: "MISSED", None: "unknown"}[t["met"]]
                sign = "<=" if t["at_most"] else ">="
                print(f"{word:8}{line['part']:24}{t['name']}: {t['value']} {sign} {t['wanted']}")
    for line in lines:
        if "error" in line:
            print(f"FAILED  {line['part']}: {line['error']}")


def parts_of(group: str):
    """The functions of a group's parts, `name -> function(work)`. ComfyUI's need ComfyUI up first."""
    if group in ("engine", "nccl"):
        from benchmarks.gpu import engine_parts

        return engine_parts.PARTS
    from benchmarks.gpu import comfy_parts

    return comfy_parts.PARTS


def child(options) -> None:
    """Run a group's parts in this process."""
    group, started = options.child, time.monotonic()
    comfy, extra = None, {}
    if group.startswith(("comfy", "newer")):
        from benchmarks.gpu import comfy_parts

        dynamic = {"newer": False, "newer-dynamic": True}.get(group)
        comfy = comfy_parts.begin(options.comfyui, options.rehearse, dynamic)
        extra = {"comfy": comfy}
    import torch

    from benchmarks.gpu.common import Card, Sizes, Work, emit, log

    if options.rehearse:
        torch.set_num_threads(1)
    card, sizes = Card(options.rehearse), Sizes.of(options.rehearse, group.startswith("newer"))
    functions = parts_of(group)
    if group == "nccl":  # what `torchrun` has started
        torch.set_grad_enabled(False)
        functions["nccl"](Work(card, sizes, 60, None))
        return
    emit(card=card.name, memory_gb=card.total / 1e9, torch=torch.__version__, cuda=torch.version.cuda, group=group,
         way=comfy and comfy.way, up_s=time.monotonic() - started, transformers=version("transformers"),
         python=sys.version.split()[0])  # fmt: skip
    guard = torch.inference_mode if comfy is not None else torch.no_grad
    for entry in options.parts.split(","):
        name, _, seconds = entry.partition("=")
        emit(begin=name)
        start = time.monotonic()
        try:
            with guard():
                act = {"failing": failing, "hanging": hanging}.get(name) or functions[name]
                act(Work(card, sizes, float(seconds), options.out), **extra)
        except Exception as error:
            log(traceback.format_exc())
            emit(error=f"{type(error).__name__}: {str(error)[:500]}", said=traceback.format_exc()[-2500:])
        if comfy is not None:
            comfy.unload(Work(card, sizes, 0, None))
        card.clean()
        emit(end=round(time.monotonic() - start, 2))


def version(package: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def failing(work, **_) -> None:
    raise RuntimeError("this part fails on purpose")


def hanging(work, **_) -> None:
    time.sleep(3600)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with small shapes")
    parser.add_argument("--parts", help="only these, by name or group:name, separated by commas")
    parser.add_argument("--minutes", type=float, default=9.0, help="when to stop (default: 9)")
    parser.add_argument("--kit", type=Path, default=KIT, help="what pack.sh has made (default: .gpu/kit.tar.gz)")
    parser.add_argument("--comfyui", type=Path, help="ComfyUI's folder (default: the kit's, else .cache/comfyui)")
    parser.add_argument("--newer", type=Path, help="a later ComfyUI's folder (default: the kit's)")
    parser.add_argument("--results", type=Path, help="folder for <card>.jsonl (default: results beside this file)")
    parser.add_argument("--append", action="store_true", help="to what an earlier run on this card has found")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.argv[1:] = []  # ComfyUI must not read them
    if options.child:
        child(options)
        return 0
    if options.results is None:
        options.results = Path(tempfile.mkdtemp()) if options.rehearse else Path(__file__).with_name("results")
    return parent(options)


if __name__ == "__main__":
    sys.exit(main())
