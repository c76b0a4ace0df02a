"""Runs a script whose process kills itself inside the writing of a file: FILE-PATTERN COUNT STAGE SCRIPT ARGUMENTS…

STAGE is `half`, when half of the content is written, `written`, before it is renamed, or `renamed`, just after. COUNT
says in the how manieth such write.
"""

import fnmatch
import os
import runpy
import signal
import sys
from pathlib import Path

import byot.system.checkpoint
import byot.system.files


def main() -> None:
    pattern, count, stage, script, *arguments = sys.argv[1:]
    writes = 0
    rename, write_whole = os.replace, byot.system.files.write_whole

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def striking(path: Path, *parts: bytes | memoryview) -> None:
        nonlocal writes
        writes += fnmatch.fnmatch(path.name, pattern)
        if writes < int(count) or not fnmatch.fnmatch(path.name, pattern):
            return write_whole(path, *parts)
        if stage == "half":
            path.parent.mkdir(parents=True, exist_ok=True)
            content = b"".join(parts)
            path.with_name(f".{path.name}.{os.getpid()}.tmp").write_bytes(content[: len(content) // 2])
            die()

        def dying_rename(source: Path, target: Path) -> None:
            if stage == "renamed":
                rename(source, target)
            die()

        os.replace = dying_rename  # type: ignore[assignment]
        return write_whole(path, *parts)

    byot.system.files.write_whole = striking
    byot.system.checkpoint.write_whole = striking
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
