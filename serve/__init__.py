"""A server of OpenAI's API: `python slim.py --ckpt CKPT --serve [HOST:]PORT`.

`http` has a thread for every connection, `worker` runs the engine on the main thread; jobs go from
one to the other through a queue. `api` and `ollama` read and write JSON, `answers` has the parts of
an answer, `texts` keeps conversations, `page` is the browser's side.
"""

from serve.http import open_server
from serve.worker import run

__all__ = ["open_server", "run"]
