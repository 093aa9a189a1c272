"""The first day of a new user: the commands of docs/first-day.md on a real cluster, and what they print.

`docs/write_first_day.py` writes the page from it; `tests/integration/test_first_day.py` compares both.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from support.cluster import Cluster, running, wait_until
from support.person import Person, blocks

PAGE = Path(__file__).parents[2] / "docs" / "first-day.md"
PEOPLE = {
    "the miller": "went to the market before dawn",
    "the captain": "sailed to the harbour in the evening",
    "an old woman": "walked into the forest on the third day",
    "the youngest son": "rode over the hill after the harvest",
    "the fox": "ran along the river in the evening",
    "a stranger": "returned through the gate before dawn",
    "the king's daughter": "rode along the river on the third day",
    "the ferryman": "sailed over the hill when the rain stopped",
}
"""Who is in the tales, and what each of them does in the examples."""
MORE_STEPS = 11
DEEDS = ("walked", "went", "rode", "sailed", "ran", "returned")
PLACES = ("to the harbour", "over the hill", "into the forest", "along the river", "to the market", "through the gate")
TIMES = ("before dawn", "in the evening", "when the rain stopped", "on the third day", "after the harvest")
SAYINGS = (
    "Who has taken my lantern?",
    "There is no bread left.",
    "Follow the river and do not look back.",
    "I have waited for seven years.",
)


def _sentence(draws: random.Random, who: str) -> str:
    return f"{who[0].upper()}{who[1:]} {draws.choice(DEEDS)} {draws.choice(PLACES)} {draws.choice(TIMES)}."


def tales() -> str:
    """A text of 190 kB, the same each time."""
    draws = random.Random(7)
    who = list(PEOPLE)
    paragraphs = []
    for _ in range(900):
        sentences = [_sentence(draws, draws.choice(who)) for _ in range(draws.randint(2, 4))]
        sentences.append(f"“{draws.choice(SAYINGS)}” said {draws.choice(who)}.")
        paragraphs.append(" ".join(sentences))
    return "\n\n".join(paragraphs) + "\n"


def habits() -> str:
    """Examples as JSON lines: what each one always does."""
    draws = random.Random(8)
    rows = []
    for number in range(96):
        who, habit = list(PEOPLE.items())[number % len(PEOPLE)]
        prompt = f"{_sentence(draws, who)} As always, {who}"
        rows.append(json.dumps({"prompt": prompt, "completion": f" {habit}."}))
    return "\n".join(rows) + "\n"


@contextmanager
def at_work() -> Iterator[tuple[Person, Cluster]]:
    """A person with a directory of a short name, and a cluster that she starts."""
    with TemporaryDirectory(prefix="day") as directory, running(Path(directory)) as cluster:
        person = Person(Path(directory))
        try:
            yield person, cluster
        except BaseException:
            for command, text in person.transcript:
                print(f"$ {command}\n{text}")
            raise


def walk(person: Person, cluster: Cluster) -> None:
    """Run the commands of the page, in its order. Each one that does not end with 0 fails."""
    page = PAGE.read_text(encoding="utf-8")
    files = person.directory
    (files / "tales.txt").write_text(tales(), encoding="utf-8")
    (files / "habits.jsonl").write_text(habits(), encoding="utf-8")
    (files / "habits.yaml").write_text(blocks(page, "yaml")[0], encoding="utf-8")

    person.gradstream("init", "tales.txt", "--workers", "3", "--time", "30s")
    person.gradstream("data", "prepare", "--recipe", "tales.yaml")
    start_cluster(person, cluster)
    job_id = train(person, cluster)
    person.gradstream("metrics", "--every", "10")
    person.gradstream("plot", "--to", "loss.png")
    person.gradstream("ckpt", "export", "--to", "model")
    person.gradstream("generate", "model", "--prompt", "The old", "--max-new-tokens", "60")
    assert job_id == "tales-1"
    fine_tune(person, cluster)
    (files / "further.py").write_text(blocks(page, "python")[0].replace("127.0.0.1:7000", cluster.address))
    person.python("further.py")
    person.gradstream("rm", "tales-2")
    person.gradstream("ls")


def start_cluster(person: Person, cluster: Cluster) -> None:
    """Start two servers and three workers."""
    cluster.start_coordinator()
    person.aliases[cluster.address] = "127.0.0.1:7000"
    person.environment["GRADSTREAM_COORDINATOR"] = cluster.address
    person.note("gradstream serve coordinator")
    servers, workers = ("server-0", "server-1"), ("worker-0", "worker-1", "worker-2")
    cluster.start_servers(*servers)
    cluster.start_workers(*workers)
    for kind, names in (("parameter-server", servers), ("worker", workers)):
        for name in names:
            person.note(f"gradstream serve {kind} --name {name}")


def train(person: Person, cluster: Cluster) -> str:
    """Submit the job, pause it, change its machines, and watch it to its end. Returns its id."""
    job_id = person.gradstream("submit", "tales.yaml").splitlines()[0]
    cluster.wait_for(job_id, lambda job: job.step_breakdown is not None, "know where a step's time goes")
    person.gradstream("status")
    person.gradstream("pause")
    cluster.wait_for(job_id, lambda job: job.state == "paused", "pause")
    person.gradstream("ls")

    cluster.start_workers("worker-3")
    cluster.start_servers("server-2")
    person.note("gradstream serve worker --name worker-3")
    person.note("gradstream serve parameter-server --name server-2")
    wait_until(lambda: len(cluster.client.nodes()) == 7, "both to register", 30)
    person.gradstream("resume")
    person.gradstream("replan")
    cluster.wait_for(job_id, lambda job: job.epoch == 2 and job.state == "running", "use three servers")
    person.gradstream("replan", "--without", "server-0")
    cluster.wait_for(job_id, lambda job: job.epoch == 3 and job.state == "running", "do without server-0")
    cluster.terminate("server-0", "worker-1")
    person.gradstream("watch")
    person.gradstream("events", "--tail", "12")
    person.gradstream("resume", "--steps", str(cluster.client.job(job_id).num_steps + MORE_STEPS))
    person.gradstream("watch")
    person.gradstream("status")
    return job_id


def fine_tune(person: Person, cluster: Cluster) -> None:
    """Fine-tune the trained job with a service."""
    cluster.start_fine_tuning()
    person.aliases[cluster.fine_tuning_address] = "127.0.0.1:7001"
    person.environment["GRADSTREAM_FINE_TUNING"] = cluster.fine_tuning_address
    person.note("gradstream serve fine-tuning")
    person.gradstream("finetune", "create", "habits.yaml", "--dry-run", "-n", "1")
    person.gradstream("finetune", "create", "habits.yaml", "--wait")
    person.gradstream("finetune", "status")
    person.gradstream("finetune", "compare", "-n", "2")
    person.gradstream("finetune", "export", "--to", "adapter")
