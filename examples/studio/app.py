"""The studio as ModelScope runs it: the small trained model, on every network, with places for many.

python examples/studio/app.py
"""

import os

from modelscope_i2v.cli import main

port = os.environ.get("GRADIO_SERVER_PORT", "7860")
raise SystemExit(main(["studio", "--host", "0.0.0.0", "--port", port, "--queue", "16"]))
