"""Submit a recipe to a cluster, watch it, and export the model: the Python client from start to end.

python examples/submit_and_watch.py recipes/stdlib-gpt.yaml exported -s training.num_steps=50
"""

from __future__ import annotations

import argparse
import sys

from gradstream.client import Checkpoint, Client, Event, GradstreamError, Step, Validation


def main() -> int:
    """Run the example; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="a recipe file")
    parser.add_argument("directory", help="where the exported model goes: new or empty")
    parser.add_argument("--coordinator", help="host:port; GRADSTREAM_COORDINATOR or 127.0.0.1:7000 by default")
    parser.add_argument("-s", "--set", action="append", default=[], metavar="KEY=VALUE", help="override of the recipe")
    arguments = parser.parse_args()
    try:
        with Client(arguments.coordinator) as client:
            job = client.submit(arguments.recipe, overrides=arguments.set)
            print(f"submitted {job.job_id}")

            # The history from its beginning until the job has ended; it goes on after a coordinator's restart.
            for item in client.watch(job.job_id):
                match item:
                    case Step(step=step, loss=loss) if step % 10 == 0:
                        print(f"step {step}: loss {loss:.4f}, {item.pushed_bytes / 1e6:.1f} MB pushed")
                    case Validation(version=version, loss=loss):
                        print(f"version {version}: validation loss {loss:.4f}")
                    case Checkpoint(version=version, state_sha256=digest):
                        print(f"version {version}: checkpoint {digest[:16]}")
                    case Event(kind=kind, message=message):
                        print(f"{kind}: {message}")

            # Raises JobFailedError, with the reason, when it did not go well.
            job = client.wait(job.job_id)
            path = client.export(job.job_id, arguments.directory)
            print(f"validation loss {job.initial_validation_loss} before, {job.validation_loss} after; model in {path}")
    except GradstreamError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
