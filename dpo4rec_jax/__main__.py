"""Names the commands: python -m dpo4rec_jax"""

from __future__ import annotations

import ast
from pathlib import Path

COMMANDS = ("train", "predict", "export", "benchmark", "rehearse")


def main() -> None:
    print("usage: python -m dpo4rec_jax.COMMAND --help\n")
    for name in COMMANDS:
        source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
        described = (ast.get_docstring(ast.parse(source)) or "").partition(":")[0]
        print(f"  {name:<10} {described}")


if __name__ == "__main__":
    main()
