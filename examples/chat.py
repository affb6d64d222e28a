"""Asks a running daemon a question and prints the answer as it comes: `python examples/chat.py "What is a list?"`.

An ordinary client: whatever is preempted meanwhile, the answer goes on.
"""

import os
import sys

from openai import OpenAI


def main(question: str) -> None:
    """Stream one answer to stdout."""
    port = os.environ.get("SPOTSERVE_PORT", "8000")
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=os.environ.get("SPOTSERVE_API_KEY", "none"))
    chunks = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        stream=True,
    )
    for chunk in chunks:
        for choice in chunk.choices:
            sys.stdout.write(choice.delta.content or "")
            sys.stdout.flush()
    sys.stdout.write("\n")


if __name__ == "__main__":
    main(sys.argv[1])
