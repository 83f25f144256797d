"""Makes locales/*/nodeDefs.json, the nodes in eight languages, from the nodes themselves and locales/strings.txt.

In strings.txt each entry is an English text as a node has it, then a line for each other language. Needs what the tests
need (`make env`). Run from the repository's root: python docs/make_locales.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LANGUAGES = ("zh", "ja", "ko", "fr", "de", "es", "ru")


def read_strings() -> dict[str, dict[str, str]]:
    """English text -> language -> translation. Exits where one lacks a language, or has one twice."""
    found = {}
    for entry in (ROOT / "locales" / "strings.txt").read_text(encoding="utf-8").strip().split("\n\n"):
        english, *others = entry.split("\n")
        found[english] = dict(line.split(" ", 1) for line in others)
        if tuple(found[english]) != LANGUAGES:
            raise SystemExit(f"locales/strings.txt: {english[:60]!r}: expected a line each for {', '.join(LANGUAGES)}")
    return found


def node_defs(info: dict, language: str, strings: dict[str, dict[str, str]]) -> dict:
    """Our nodes of an /object_info answer in a language, as ComfyUI's frontend wants them."""

    def say(text: str) -> str:
        if language == "en":
            return text
        if text not in strings:
            raise SystemExit(f"locales/strings.txt: nothing for {text!r}; add it with its translations")
        return strings[text][language]

    def name_and_tooltip(name: str, tooltip: str | None) -> dict:
        return {"name": say(name), **({"tooltip": say(tooltip)} if tooltip else {})}

    found = {}
    for key, node in sorted(info.items()):
        if not key.startswith("Skrr") or key.startswith("SkrrTest"):
            continue
        inputs = {**node["input"]["required"], **node["input"].get("optional", {})}
        outputs = zip(node["output_name"], node["output_tooltips"], strict=True)
        found[key] = {
            "display_name": say(node["display_name"]),
            "description": say(node["description"]),
            "inputs": {name: name_and_tooltip(name, entry[1].get("tooltip")) for name, entry in inputs.items()},
            "outputs": {str(n): name_and_tooltip(*pair) for n, pair in enumerate(outputs)},
        }
    return found


def main() -> None:
    """Write all files."""
    sys.path.insert(0, str(ROOT / "tests"))
    import comfy_runtime

    strings = read_strings()
    with comfy_runtime.Server(comfy_runtime.comfyui_root(ROOT / ".cache"), {"skrr": ROOT}) as server:
        info = server.get("/object_info")
    for language in ("en", *LANGUAGES):
        path = ROOT / "locales" / language / "nodeDefs.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(node_defs(info, language, strings), indent=2, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
