"""Ask what `serve.py` serves, whatever happens to its replicas; needs nothing but Python.

python examples/on_ray/client.py http://127.0.0.1:8000/ "a fine film"
"""

from __future__ import annotations

import http
import json
import sys
import time
import urllib.error
import urllib.request
from typing import Any


def ask(url: str, text: str, *, patience: float = 60.0) -> dict[str, Any]:
    """Return the answer to a text; ask again while a replica or its proxy is away.

    An engine that is asked twice gives the same answer, so asking again is safe.

    Args:
        url: where it is served.
        text: the text.
        patience: seconds after which it is given up.

    Raises:
        OSError: there was no answer in time, or the request is refused.
    """
    end, pause = time.monotonic() + patience, 0.05
    body = json.dumps({"text": text}).encode()
    while True:
        try:
            with urllib.request.urlopen(url, body, timeout=10) as response:
                answer: dict[str, Any] = json.load(response)
                return answer
        except urllib.error.HTTPError as error:
            error.close()
            # Below 500 it is the request that is wrong: asking again would not help. But the proxy
            # is up before what it serves, and has nothing there until then.
            wrong = error.code < 500 and error.code != http.HTTPStatus.NOT_FOUND
            if wrong or time.monotonic() > end:
                raise
        except OSError:  # no connection, or one that broke off
            if time.monotonic() > end:
                raise
        time.sleep(pause)
        pause = min(2 * pause, 1.0)


if __name__ == "__main__":
    for given in sys.argv[2:]:
        print(json.dumps(ask(sys.argv[1], given)))
