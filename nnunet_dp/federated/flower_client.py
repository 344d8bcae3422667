"""The site's Flower app: it reads the site's settings, hands each message to ``site.handle`` and sends what comes back.

Nothing else leaves: no exception text (everything that goes wrong here is ``Code.failed``), nothing in
``Context.state``, which Flower keeps between messages and which is not the site's own disk.

    flower-supernode --node-config 'settings="/where/it/is/site.toml"' ...

Design note: this module is loaded from the site's own installation (``flower_commands``), never from what a server
sends.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from pydantic import TypeAdapter, ValidationError

from nnunet_dp.federated.flower_transport import packed, unpacked
from nnunet_dp.federated.protocol import Code, Hex, Kind, Reply

if TYPE_CHECKING:
    from nnunet_dp.federated.site_settings import SiteSettings

SETTINGS = "settings"
"""Key of the settings file's path in Flower's node configuration."""
NAMELESS = "nameless"
"""Stands for the site where its settings cannot be read."""

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Who the site is and what its dataset looks like."""
    return answer("query", message, context)


@app.query("fingerprint")
def fingerprint(message: Message, context: Context) -> Message:
    """Release votes on spacing, size and intensities."""
    return answer("fingerprint", message, context)


@app.query("prepare")
def prepare(message: Message, context: Context) -> Message:
    """Preprocess."""
    return answer("prepare", message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Take the local steps of a round."""
    return answer("train", message, context)


def answer(kind: Kind, message: Message, context: Context) -> Message:
    """The reply to a message; never raises an ``Exception``."""
    settings, header = None, ""
    try:
        header, arrays = unpacked(message.content)
        settings = _settings(context)
        from nnunet_dp.federated.site import handle

        content = packed(*handle(kind, header, arrays, settings))
    except Exception:
        traceback.print_exc(file=sys.stderr)  # the SuperNode's log, which stays at the site
        content = packed(_failed(settings, header), {})
    return Message(content, reply_to=message)


def _settings(context: Context) -> SiteSettings:
    from nnunet_dp.federated.site_settings import read_settings

    return read_settings(Path(str(context.node_config[SETTINGS])))


def _failed(settings: SiteSettings | None, header: str) -> str:
    """A reply that says no more than that."""
    try:
        content = json.loads(header)
        run = TypeAdapter(Hex).validate_python(content.get("run") or content["terms"]["run"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ValidationError):
        run = "0"
    site = NAMELESS if settings is None else settings.name
    return Reply(code=Code.failed, site=site, run=run).model_dump_json(exclude_none=True)
