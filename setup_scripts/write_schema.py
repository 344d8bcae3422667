"""Write docs/schemas/privacy_card_v1.schema.json from the card's own models: ``write_schema.py [--print]``."""

import json
import sys
from pathlib import Path

from nnunet_dp.card import Card

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "schemas"


def name() -> str:
    """One file for each version of the schema: a published one never changes its meaning."""
    return f"privacy_card_v{Card.model_json_schema()['properties']['schema_version']['const']}.schema.json"


def document() -> str:
    """The whole file."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": name(), **Card.model_json_schema()}
    return json.dumps(schema, indent=2) + "\n"


if __name__ == "__main__":
    if "--print" in sys.argv[1:]:
        sys.stdout.write(document())
    else:
        FOLDER.mkdir(exist_ok=True)
        (FOLDER / name()).write_text(document())
