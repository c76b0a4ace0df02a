"""Makes pages: one HTML file with its style sheet and figures inside, which opens without a network."""

import base64
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from analysis.figures import Drawing, to_svg


def fill_template(template: str, pictures: Mapping[str, Drawing], **values: Any) -> str:
    """Render a template of this folder as HTML; it gets each picture as (SVG in base64, words)."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    encoded = {
        name: (base64.b64encode(to_svg(figure)).decode("ascii"), words) for name, (figure, words) in pictures.items()
    }
    written = datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC")
    return environment.get_template(template).render(pictures=encoded, written=written, **values)
