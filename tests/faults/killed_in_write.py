"""Runs a script that kills itself while it writes a file: FILE-PATTERN COUNT STAGE SCRIPT ARGUMENTS…

It dies in the COUNTth write of a file whose name matches. STAGE says what it leaves: `half` of the content under the
temporary name, the whole there (`written`), or the file under its own name (`renamed`).
"""

import os
import runpy
import signal
import sys
from pathlib import Path


def main() -> None:
    pattern, count, stage, script, *arguments = sys.argv[1:]
    rename, num_writes = os.replace, 0

    def rename_or_die(source: Path, target: Path) -> None:
        nonlocal num_writes
        num_writes += Path(target).match(pattern)
        dies = num_writes == int(count) and Path(target).match(pattern)
        if dies and stage == "half":
            os.truncate(source, Path(source).stat().st_size // 2)
        if not dies or stage == "renamed":
            rename(source, target)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = rename_or_die  # type: ignore[assignment]
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
