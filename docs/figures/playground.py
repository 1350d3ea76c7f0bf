r"""Draw `playground.png`: an exported page as a browser shows it, without its times, which are of one machine.

python -m llm_variator.playground --export page.html --prompt-file examples/long_prompt.txt --chat \
    --max-new-tokens 48 --repetitions 1
python docs/figures/playground.py page.html
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from browser import browsing, find_browser, look

WITHOUT_TIMES = (
    "document.querySelectorAll('[data-figure=first], [data-figure=speed]').forEach(e => e.parentElement.remove());"
    "document.querySelector('.document').scrollTop = 300"
)


def main() -> None:
    """Write the picture beside this file."""
    program = find_browser()
    if program is None:
        raise SystemExit("no browser: set CHROME")
    with browsing(program) as browser:
        seen = look(browser, Path(sys.argv[1]), width=1000, ask={"": WITHOUT_TIMES})
    if seen.complaints:
        raise SystemExit(f"the page complains: {seen.complaints}")
    Path(__file__).with_suffix(".png").write_bytes(seen.screen)


if __name__ == "__main__":
    main()
