"""A queue in a folder, so that nothing else is needed to try it. In earnest: your broker."""

from __future__ import annotations

import os
from pathlib import Path

folder = Path(os.environ.get("CELERY_FOLDER", "queue"))
for each in ("messages", "control", "results"):
    (folder / each).mkdir(parents=True, exist_ok=True)

broker_url = "filesystem://"
broker_transport_options = {
    "data_folder_in": f"{folder}/messages",
    "data_folder_out": f"{folder}/messages",
    "control_folder": f"{folder}/control",
    "polling_interval": 0.1,
}
result_backend = f"file://{folder.absolute()}/results"
