"""Replay one seed with its whole story: `python -m tests.sim SEED`, of memory that is fetched with `--fetch`."""

import argparse
import logging
import sys

from .fetch_story import FetchStory
from .play import Story


def main():
    """Print every event of the story, and how it ended."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--fetch", action="store_true")
    parser.add_argument("seed", type=int)
    asked = parser.parse_args()
    seed = asked.seed
    logging.disable()  # the story has all of it
    story = (FetchStory if asked.fetch else Story)(seed, whole=True)
    try:
        end, status = story.play(), 0
    except Exception as error:
        end, status = f"{type(error).__name__}: {error}", 1
    last = f"seed {seed}, {story.world.steps} steps, {story.world.now:.4f} s: {end}"
    sys.stdout.write("\n".join([*story.world.lines(), last, ""]))
    return status


if __name__ == "__main__":
    sys.exit(main())
