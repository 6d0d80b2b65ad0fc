"""Tests run offline: whatever a test needs, it builds on disk or the packaged files hold."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
