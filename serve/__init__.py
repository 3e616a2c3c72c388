"""A server of OpenAI's API: `python slim.py --ckpt CKPT --serve [HOST:]PORT`.

`http` has a thread for every connection, `worker` runs the engine on the main thread; jobs go from
one to the other through a queue. `api` reads and writes OpenAI's JSON; `texts` keeps conversations.
"""

from serve.http import open_server
from serve.worker import run

__all__ = ["open_server", "run"]
