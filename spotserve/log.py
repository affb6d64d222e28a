"""Logging set-up: structlog events in snake_case, values as keys, on stderr and never a prompt or a secret."""

from __future__ import annotations

import logging
import sys
from typing import Literal, TextIO, cast

import structlog


def configure_logging(
    log_format: Literal["console", "json"] = "console", *, stream: TextIO | None = None, level: int = logging.INFO
) -> None:
    """Route every structlog event to `stream` (stderr by default) in the format asked for."""
    target = stream if stream is not None else sys.stderr
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer(sort_keys=True)
        if log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=target.isatty())
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(file=target),
        cache_logger_on_first_use=False,
    )


def get_logger(name: str) -> structlog.typing.FilteringBoundLogger:
    """A logger whose every line carries the component's name."""
    return cast("structlog.typing.FilteringBoundLogger", structlog.get_logger(component=name))
