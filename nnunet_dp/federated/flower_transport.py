"""Messages over Flower: a header and named arrays each way, and the coordinator's transport over a Flower ``Grid``.

A message's content is one ConfigRecord ``header`` (one text) and one ArrayRecord ``arrays`` (one vector of bytes: the
named arrays in safetensors' form, which cannot hold code). Flower moves every array of a record in several HTTP
requests on every hop; one vector makes a round trip of a U-Net's weights about as cheap as that of one array.

>>> header, arrays = unpacked(packed('{"round": 3}', {"weight": np.ones((2, 2), np.float32)}))
>>> header, arrays["weight"].shape, arrays["weight"].dtype.name
('{"round": 3}', (2, 2), 'float32')

Design note: only replies to the messages of one exchange are ever asked for. A reply that comes late answers an older
message, so it cannot be taken for one of a newer round; the SuperLink forgets it when the message's time is over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import safetensors.numpy
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message import Array
from flwr.serverapp import Grid

from nnunet_dp.federated.protocol import Arrays, Kind

MESSAGE_TYPES: dict[Kind, str] = {
    "query": "query", "fingerprint": "query.fingerprint", "prepare": "query.prepare", "train": "train",
}  # fmt: skip
"""Flower's names of our kinds: a category, and an action where the kind is not a category itself."""
_HEADER, _ARRAYS = "header", "arrays"
_LARGEST_BYTES = 1 << 30


def packed(header: str, arrays: Arrays) -> RecordDict:
    """A message's content.

    Args:
        header: JSON.
        arrays: any shapes; the order of the names is not kept.
    """
    named = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    vector = np.frombuffer(safetensors.numpy.save(named), np.uint8)
    content = RecordDict()
    content[_HEADER] = ConfigRecord({_HEADER: header})
    content[_ARRAYS] = ArrayRecord({_ARRAYS: Array.from_numpy_ndarray(vector)})
    return content


def unpacked(content: RecordDict) -> tuple[str, dict[str, np.ndarray]]:
    """Header and arrays of a message's content.

    Raises:
        ValueError: for anything that ``packed`` does not make.
    """
    try:
        header = cast(ConfigRecord, content[_HEADER])[_HEADER]
        array = cast(ArrayRecord, content[_ARRAYS])[_ARRAYS]
        if not isinstance(header, str) or len(array.data) > _LARGEST_BYTES:
            raise ValueError("the header should be a text, and the arrays at most a GiB")
        vector = array.numpy()
        if vector.dtype != np.uint8 or vector.ndim != 1:
            raise ValueError("the arrays should be one vector of bytes")
        return header, safetensors.numpy.load(vector.tobytes())
    except Exception as error:  # the other side chose every byte of it: whatever is raised, it is malformed
        raise ValueError(f"malformed message: {type(error).__name__}") from None


@dataclass(frozen=True)
class Traffic:
    """What one exchange moved, payload only.

    Attributes:
        sent_bytes: to all sites together.
        received_bytes: from all sites together.
        seconds: from the first message to the last reply.
    """

    sent_bytes: int = 0
    received_bytes: int = 0
    seconds: float = 0.0


class GridTransport:
    """The coordinator's ``Transport``: nodes are Flower's SuperNodes, named by their node id.

    Attributes:
        traffic: of the last exchange.
    """

    def __init__(self, grid: Grid, log: Callable[[str], None] = lambda line: None, poll_seconds: float = 0.3) -> None:
        self._grid, self._log, self._poll_seconds = grid, log, poll_seconds
        self.traffic = Traffic()

    def sites(self, minimum: int, timeout_s: float) -> list[str]:
        """Nodes that are online: as soon as there are ``minimum``, or those there are after ``timeout_s``.

        A killed SuperNode is counted until it has missed its heartbeats for a minute.
        """
        end = time.monotonic() + timeout_s
        while True:
            nodes = sorted(str(node) for node in self._grid.get_node_ids())
            if len(nodes) >= minimum or time.monotonic() >= end:
                return nodes
            time.sleep(self._poll_seconds)

    def exchange(
        self, kind: Kind, messages: Mapping[str, tuple[str, Arrays]], timeout_s: float
    ) -> dict[str, tuple[str, dict[str, np.ndarray]]]:
        """Send each node its message and collect what comes back within ``timeout_s``.

        Returns:
            Replies by node. A node without a reply, or with one of Flower's errors, is missing; a reply that is no
            header with arrays comes back as an empty header, for the coordinator to reject by name.
        """
        start = time.monotonic()
        waiting, sent_bytes = self._push(kind, messages, timeout_s)
        replies: dict[str, tuple[str, dict[str, np.ndarray]]] = {}
        received_bytes = 0
        end = time.monotonic() + timeout_s
        while waiting:
            for message in self._grid.pull_messages(list(waiting)):
                node = waiting.pop(message.metadata.reply_to_message_id, None)
                if node is not None and self._usable(node, message):
                    replies[node] = self._read(node, message)
                    received_bytes += _size(message.content)
            if time.monotonic() >= end:
                break
            if waiting:
                time.sleep(self._poll_seconds)
        for node in waiting.values():
            self._log(f"node {node}: no reply within {timeout_s:.0f} s")
        self.traffic = Traffic(sent_bytes, received_bytes, time.monotonic() - start)
        return replies

    def _push(
        self, kind: Kind, messages: Mapping[str, tuple[str, Arrays]], timeout_s: float
    ) -> tuple[dict[str, str], int]:
        """Node of every message id that was taken; one by one, so that one bad node costs itself alone."""
        waiting, sent_bytes = {}, 0
        for node, (header, arrays) in messages.items():
            content = packed(header, arrays)
            message = Message(content, int(node), MESSAGE_TYPES[kind], ttl=timeout_s)
            identifiers = cast(Sequence[str | None], self._grid.push_messages([message]))
            if not identifiers or not identifiers[0]:
                self._log(f"node {node}: the SuperLink did not take the message")
                continue
            waiting[identifiers[0]] = node
            sent_bytes += _size(content)
        return waiting, sent_bytes

    def _usable(self, node: str, message: Message) -> bool:
        if message.has_error():  # the reason may be any text a site's Flower produced: the number alone is said
            self._log(f"node {node}: Flower's error {message.error.code}")
        return message.has_content()

    def _read(self, node: str, message: Message) -> tuple[str, dict[str, np.ndarray]]:
        try:
            return unpacked(message.content)
        except ValueError as error:
            self._log(f"node {node}: {error}")
            return "", {}


def _size(content: RecordDict) -> int:
    """Bytes of the arrays and texts in a content."""
    arrays = sum(len(array.data) for record in content.array_records.values() for array in record.values())
    texts = (value for record in content.config_records.values() for value in record.values() if isinstance(value, str))
    return arrays + sum(len(text.encode()) for text in texts)
