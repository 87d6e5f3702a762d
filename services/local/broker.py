"""Who may do what at the broker, and its configuration: a user for each service, an nkey for each agent, nothing more.

There are two accounts. In ``RATCHET`` live the streams and the services; in ``OUTSIDE`` the agents and the world, who
may publish to ``steps.*`` and ``outcomes.*`` there and see nothing else. One account would not do: whoever publishes
names the subject that the broker answers on, and no permission bounds it. An agent that named ``window.closed`` had the
broker itself write there (nats-server 2.15.1). Across accounts the answer stays with the agents.

``python -m services.local.broker > deploy/nats/nats.conf`` writes the one of docker-compose.yml.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from shared import subjects

OPERATOR = "operator"  # may do all: whoever runs commands, and the provisioner
WORLD = "world"  # tells what happened; never an agent
ROUTES, GATEWAY_KEYS = subjects.ROUTES_BUCKET, subjects.KEYS_BUCKET
OUTSIDE_SUBJECTS = (subjects.steps("*"), subjects.outcomes("*"))


@dataclass(frozen=True)
class Role:
    """What a user may do. ``answers``: it may reply once to whoever asks it."""

    publish: tuple[str, ...] = ()
    subscribe: tuple[str, ...] = ()
    answers: bool = False


@dataclass(frozen=True)
class Tls:
    """Files of the server's certificate and key, in PEM."""

    certificate: Path
    key: Path


def consumes(*consumers: subjects.Consumer) -> tuple[str, ...]:
    """To fetch, look at and ack (in the older and the newer form), and to bury what can never be handled."""
    return tuple(
        subject
        for stream, durable in ((c.stream, c.durable) for c in consumers)
        for subject in (
            f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{durable}",
            f"$JS.API.CONSUMER.INFO.{stream}.{durable}",
            f"$JS.ACK.{stream}.{durable}.>",
            f"$JS.ACK.*.*.{stream}.{durable}.>",
            f"dead.{durable}",
        )
    )


def looks_at(stream: str) -> str:
    return f"$JS.API.STREAM.INFO.{stream}"


def inbox(name: str) -> str:
    """Where answers to a user come; agents' inboxes are in an account of their own."""
    return f"_INBOX_{name}.>"


def writes(bucket: str) -> tuple[str, ...]:
    """To read single entries of a KV bucket and to put them."""
    return (
        looks_at(f"KV_{bucket}"),
        f"$JS.API.STREAM.MSG.GET.KV_{bucket}",
        f"$JS.API.DIRECT.GET.KV_{bucket}.$KV.{bucket}.>",  # the same, of a bucket that was made with direct access
        f"$KV.{bucket}.>",
    )


def watches(*buckets: str) -> tuple[str, ...]:
    """To read KV buckets whole, and to hear each change."""
    return (
        "$JS.API.STREAM.NAMES",
        *(
            subject
            for stream in (f"KV_{bucket}" for bucket in buckets)
            for subject in (
                looks_at(stream),
                f"$JS.API.CONSUMER.CREATE.{stream}",  # its watch, without a name
                f"$JS.API.CONSUMER.INFO.{stream}.*",
                f"$JS.FC.{stream}.>",
            )
        ),
    )


SERVICES: Mapping[str, Role] = {
    "recorder": Role(
        publish=(
            *consumes(subjects.RECORDER_STEPS),
            looks_at(subjects.RECORDER_STEPS.stream),
            f"$JS.API.STREAM.MSG.GET.{subjects.RECORDER_STEPS.stream}",
            f"$JS.API.STREAM.PURGE.{subjects.RECORDER_STEPS.stream}",  # what is stored, a day later
            subjects.WINDOW_CLOSED,
        ),
        subscribe=(subjects.command("recorder", "*"),),
        answers=True,
    ),
    "outcome_tracker": Role(
        publish=(
            *consumes(subjects.TRACKER_OUTCOMES, subjects.TRACKER_CLOSED),
            looks_at(subjects.TRACKER_OUTCOMES.stream),
            subjects.outcomes("*"),  # what it pulls comes in where the world's facts do
            subjects.WINDOW_RESOLVED,
        ),
        subscribe=(subjects.command("outcome_tracker", "*"),),
        answers=True,
    ),
    "scorer": Role(
        publish=(*consumes(subjects.SCORER_RESOLVED), subjects.GROUP_SCORED),
        subscribe=(subjects.command("scorer", "*"),),
        answers=True,
    ),
    "trainer": Role(
        publish=(*consumes(subjects.TRAINER_SCORED), subjects.TRAINING_PROGRESS, subjects.MODEL_TRAINED),
        subscribe=(subjects.command("trainer", "*"),),
        answers=True,
    ),
    "deployer": Role(
        publish=(
            *consumes(subjects.DEPLOYER_TRAINED, subjects.DEPLOYER_RESOLVED),
            subjects.MODEL_DEPLOYED,
            subjects.MODEL_ROLLED_BACK,
            *writes(ROUTES),
        ),
        subscribe=(subjects.command("deployer", "*"), subjects.GATEWAY_HEALTH),
        answers=True,
    ),
    "gateway": Role(
        publish=(
            subjects.calls("*"),  # it is the one witness of calls
            subjects.GATEWAY_HEALTH,
            *watches(ROUTES, GATEWAY_KEYS),
            subjects.command("admin", "key_use"),
        ),
    ),
    "inference": Role(),
    "admin": Role(
        publish=(
            *(f"$JS.API.CONSUMER.INFO.{c.stream}.{c.durable}" for c in subjects.CONSUMERS),
            subjects.command("trainer", "readiness"),
            *watches(GATEWAY_KEYS),
            *writes(GATEWAY_KEYS),
            subjects.ready("*"),
            subjects.ready("*", "*"),
        ),
        subscribe=(subjects.command("admin", "*"),),
        answers=True,
    ),
}
USERS = (OPERATOR, *SERVICES, WORLD)
# Its inbox is every client's default, so that whoever reports facts has nothing to set; no agent's name has a dot.
THE_WORLD = Role(publish=(subjects.outcomes("*"),), subscribe=("_INBOX.>",))


def with_inbox(name: str, role: Role) -> Role:
    """With what every service has: answers come to it, and it says whether it is ready."""
    return Role(
        role.publish,
        (inbox(name), subjects.ready(name), subjects.ready(name, "*"), *role.subscribe),
        answers=True,
    )


def agent(name: str) -> Role:
    """An agent publishes its own events and hears what became of them."""
    return Role(publish=(subjects.steps(name),), subscribe=(inbox(name),))


def configuration(
    *,
    listen: str,
    store: str,
    password: Callable[[str], str],
    agents: Mapping[str, str],
    http: str | None = None,
    tls: Tls | None = None,
) -> str:
    """The whole of ``nats.conf``. ``password``: a user's as it is to stand there; ``agents``: name -> public nkey."""
    services = [_user(name, password(name), with_inbox(name, role)) for name, role in SERVICES.items()]
    return "\n".join(
        [
            "# Made by services/local/broker.py, where the rules stand; the same for one machine, compose and tests.",
            "server_name: ratchet",
            f"listen: {listen}",
            *([f"http: {http}"] if http else []),
            "max_payload: 8MB # events are at most 4 MiB; a message over this would close its client for good",
            *([f"tls {{ cert_file: {quoted(tls.certificate)}, key_file: {quoted(tls.key)} }}"] if tls else []),
            "jetstream {",
            f"  store_dir: {store}",
            "  sync_interval: always # the default is two minutes: a power cut would lose acknowledged events",
            "}",
            "accounts {",
            "  RATCHET {",
            "    jetstream: enabled",
            "    exports: [",
            *(f'      {{ service: "{subject}", accounts: [OUTSIDE] }}' for subject in OUTSIDE_SUBJECTS),
            "    ]",
            "    users: [",
            f"      {{ user: {OPERATOR}, password: {password(OPERATOR)} }}",
            *services,
            "    ]",
            "  }",
            "  OUTSIDE {",
            "    imports: [",
            *(f'      {{ service: {{ account: RATCHET, subject: "{subject}" }} }}' for subject in OUTSIDE_SUBJECTS),
            "    ]",
            "    users: [",
            _user(WORLD, password(WORLD), THE_WORLD),
            "      # agents: `ratchet agents add NAME` makes the line that belongs here",
            *(f"      {agent_line(name, key)}" for name, key in sorted(agents.items())),
            "    ]",
            "  }",
            "}",
            "",
        ]
    )


def agent_line(name: str, public_key: str) -> str:
    """The agent among the users of the account OUTSIDE."""
    role = agent(name)
    allowed = f'publish: {{ allow: ["{role.publish[0]}"] }}, subscribe: {{ allow: ["{role.subscribe[0]}"] }}'
    return f"{{ nkey: {public_key}, permissions: {{ {allowed} }} }}"


def _user(name: str, password: str, role: Role) -> str:
    """Several lines. An empty list would allow everything: who may publish nothing is denied all."""
    lines = [
        f"      {{ user: {name}, password: {password}, permissions: {{",
        *(_lists("publish", role.publish) if role.publish else ['          publish: { deny: ">" }']),
        *_lists("subscribe", role.subscribe),
        *(['          allow_responses: { max: 1, expires: "5m" }'] if role.answers else []),
        "      } }",
    ]
    return "\n".join(lines)


def _lists(what: str, items: tuple[str, ...]) -> list[str]:
    return [f"          {what}: {{ allow: [", *(f'            "{item}"' for item in items), "          ] }"]


def quoted(path: Path) -> str:
    return '"' + str(path.absolute()).replace("\\", "\\\\").replace('"', '\\"') + '"'


def of_compose() -> str:
    """``deploy/nats/nats.conf``: passwords come from the environment, monitoring is not published to the host."""
    return configuration(
        listen="0.0.0.0:4222",
        http="0.0.0.0:8222",
        store="/data",
        password=lambda user: f"${variable(user)}",
        agents={},
    )


def variable(user: str) -> str:
    """The name of the environment variable that holds a user's password, in compose."""
    return f"RATCHET_NATS_PASSWORD_{user.upper()}"


if __name__ == "__main__":
    sys.stdout.write(of_compose())
