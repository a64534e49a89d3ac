"""`hybridgen map`: asks a server where its host pages lie, and why."""

import sys

import httpx

from hybridgen.configs.settings import client_api_key


def placement(*, url: str, page: int | None, api_key: str | None) -> int:
    """Print it; return the exit status."""
    key = api_key or client_api_key()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx.get(
            f"{url.rstrip('/').removesuffix('/v1')}/placement",
            params={} if page is None else {"page": page},
            headers=headers,
            timeout=30.0,
        )
        body = answer.json()
    except (httpx.HTTPError, ValueError) as error:
        print(f"hybridgen map: no answer from {url}: {error}", file=sys.stderr)
        return 1
    if answer.status_code != 200:
        message = body.get("error", {}).get("message", body)
        print(f"hybridgen map: {url} answered {answer.status_code}: {message}", file=sys.stderr)
        return 1
    print("\n".join(body["lines"]))
    return 0
