"""The coordinator's Flower app: it runs ``coordinator.Coordinator`` over Flower's ``Grid`` and leaves its end on disk.

    flwr run APP CONNECTION --run-config 'config="/run/config.json" folder="/run"'

    folder/server_app.json     Flower's number of the run, and the process that runs the coordinator
    folder/server_lines.txt    what the coordinator says, as it says it
    folder/server_ended.json   {"exit_code": 0, "message": ""}, written last; absent when the process was killed
    folder/server_result.json  the coordinator's result
    folder/server_error.txt    why it ended otherwise

The model and the state to resume from are the coordinator's own files. A configuration named ``survey.json`` is a
``survey.Survey``'s instead.
"""

from __future__ import annotations

import dataclasses
import json
import os
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from pydantic import BaseModel

from nnunet_dp.errors import Refusal
from nnunet_dp.federated.flower_runs import APP, ENDED, LINES, began
from nnunet_dp.federated.flower_transport import GridTransport
from nnunet_dp.federated.process_table import Process
from nnunet_dp.replacing import replacing

CONFIG, FOLDER = "config", "folder"
"""Keys of Flower's run configuration."""
RESULT, ERROR = "server_result.json", "server_error.txt"

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the coordinator to its end; raises what it raises, so that Flower marks the run as failed."""
    folder = Path(str(context.run_config[FOLDER]))
    work = partial(_coordinate, grid, Path(str(context.run_config[CONFIG])), folder)
    end_is_written(folder, str(context.run_id), work)


def end_is_written(folder: Path, run_id: str, work: Callable[[], Any]) -> None:
    """Do the work and leave in ``folder`` whose it is and how it ended."""
    _write(folder / APP, began(run_id, Process.of(os.getpid())))
    try:
        result = work()
        _write(folder / RESULT, result)
    except BaseException as error:
        refused = isinstance(error, Refusal)
        message = str(error) if refused else f"{type(error).__name__}: see {ERROR}"
        (folder / ERROR).write_text(str(error) if refused else traceback.format_exc(), encoding="utf-8")
        _write(folder / ENDED, {"exit_code": error.exit_code if isinstance(error, Refusal) else 1, "message": message})
        raise
    _write(folder / ENDED, {"exit_code": 0, "message": ""})


def _coordinate(grid: Grid, config_file: Path, folder: Path) -> Any:
    def say(line: str) -> None:
        print(line, flush=True)
        with (folder / LINES).open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    transport = GridTransport(grid, say)
    if config_file.stem == "survey":
        from nnunet_dp.federated.survey import Survey, read_survey

        return Survey(read_survey(config_file), transport, folder, say).run()
    from nnunet_dp.federated.coordinator import Coordinator
    from nnunet_dp.federated.run_config import read_config

    return Coordinator(read_config(config_file), transport, folder, say).run()


def _write(file: Path, content: Any) -> None:
    with replacing(file) as stream:
        stream.write(json.dumps(content, default=_plain, indent=1).encode())


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else str(value)
