"""The two deployments of an application on Ray Serve: replicas of a model, and what stands before them.

A replica is a process with an engine, its loop and the unchanged web application; a front reads requests and has them
answered. What builds the engine is given as a function, because this package knows no device.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import Any

from aiohttp import web
from ray import serve
from ray.exceptions import RayActorError, RayError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from engine.config import ServerOptions, StartupError
from engine.engine import Engine
from engine.process import settle
from engine.request import RequestError
from engine.watchdog import Watchdog
from server.ray.bridge import Ask, Bridge, Head, Piece
from server.ray.front import REPLICA_HEADER, Front, FullError, GoneError
from server.ray.prefixes import Seen
from server.ray.weights import Held, SiblingWeights

logger = logging.getLogger("oneloop.ray")

# Of a new replica: how long it waits until it knows of the others, and when it asks them again.
SIBLINGS_S, SIBLINGS_TRIES, BETWEEN_S = 5.0, 3, 0.3
AGAIN_S, AGAIN_TIMES = 5.0, 12


@dataclass(frozen=True, slots=True)
class Hosted:
    """What a replica serves."""

    engine: Engine
    app: web.Application
    options: ServerOptions


class Replica:
    """One engine. Serve makes it, asks it how it is, and ends it; `answer` is what the fronts call.

    make: builds the engine and its application, in the replica's process.
    """

    async def __init__(self, make: Callable[[], Hosted]) -> None:  # type: ignore[misc]  # Serve awaits it
        hosted = make()
        self._engine, self._options = hosted.engine, hosted.options
        context = serve.get_replica_context()
        self._id = str(context.replica_id.unique_id)
        self._seen = Seen(hosted.engine.limits.capacity)
        self._num_ongoing = 0
        self._bridge = Bridge(hosted.app, hosted.engine, hosted.options)
        await self._bridge.open()
        settle()
        self._watchdog = Watchdog(self._engine.seconds_since_progress, self._options.stall_timeout_s)
        self._watchdog.start()
        self._running = asyncio.create_task(self._engine.run(), name="engine")
        self._weights = SiblingWeights(self._engine, self._id)
        self._siblings = serve.get_deployment_handle(context.deployment, context.app_name)
        for _ in range(SIBLINGS_TRIES):
            if await self._ask_siblings("weights_held"):
                try:
                    await self._weights.catch_up(self._ask_siblings)
                except (OSError, RequestError, StartupError) as error:
                    # Others come by meanwhile; it is looked for again below, too.
                    logger.warning("the weights of the other replicas are not here yet: %s", error)
                else:
                    break
            await asyncio.sleep(BETWEEN_S)
        again = self._weights.look_again(self._ask_siblings, AGAIN_S, AGAIN_TIMES)
        self._looking = asyncio.create_task(again, name="weights")

    async def _ask_siblings(self, method: str, *args: Any) -> list[Any]:
        """What the replicas say that Serve knows of; nothing where it knows none."""
        with suppress(DeploymentUnavailableError, TimeoutError):
            async with asyncio.timeout(SIBLINGS_S):
                response = self._siblings.broadcast(method, *args)
                answers = await response.results_async(return_exceptions=True)
            return [one for one in answers if not isinstance(one, BaseException)]
        return []

    async def weights_held(self) -> Held:
        """For siblings that start; see SiblingWeights."""
        return await self._weights.held()

    async def weights_piece(self, replica: str, updates: int, name: str, offset: int) -> bytes | None:
        """For siblings that start; see SiblingWeights."""
        return await self._weights.piece(replica, updates, name, offset)

    async def check_health(self) -> None:
        """Raises where nothing would be answered any more: Serve ends this replica then and starts another."""
        if self._running.done():
            raise RuntimeError("the engine has failed")
        if self._engine.seconds_since_progress() > self._options.stall_timeout_s:
            raise RuntimeError("a step of the engine does not end")

    async def answer(self, ask: Ask) -> AsyncGenerator[Piece, None]:
        """A Head, then bytes; closed by Serve when the front's client left."""
        self._seen.add(ask.beginnings)
        self._num_ongoing += 1
        try:
            async with aclosing(self._bridge.answer(ask)) as pieces:
                async for piece in pieces:
                    if isinstance(piece, Head):
                        piece = replace(piece, headers=[*piece.headers, (REPLICA_HEADER, self._id)])
                    yield piece
        finally:
            self._num_ongoing -= 1

    async def answer_whole(self, ask: Ask) -> tuple[Head, bytes]:
        """For what every replica is asked."""
        head, data = Head(500, ()), b""
        async with aclosing(self.answer(ask)) as pieces:
            async for piece in pieces:
                if isinstance(piece, Head):
                    head = piece
                else:
                    data += piece
        return head, data

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What `scaling.policy` reads."""
        stats = self._engine.stats()
        rows = self._engine.limits.max_num_seqs
        return {"running": stats.num_running, "waiting": stats.num_waiting, "rows": rows}

    def record_routing_stats(self) -> dict[str, Any]:
        """What `CacheAwareRouter` reads."""
        return {"ongoing": self._num_ongoing, **self._seen.published()}

    async def __del__(self) -> None:
        """Called by Serve, after the requests that it knows of: what goes on without a client (background) ends too."""
        await self._bridge.close()
        self._watchdog.close()
        self._looking.cancel()
        self._running.cancel()
        await asyncio.wait({self._running, self._looking})
        self._weights.close()
        self._engine.executor.close()


class HandleBackend:
    """A front's Backend over a handle of Serve."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._streaming = handle.options(stream=True, method_name="answer")

    async def answer(self, ask: Ask) -> AsyncGenerator[Piece, None]:
        """See Backend."""
        pieces = self._streaming.remote(ask)
        ended = False
        try:
            async for piece in pieces:
                yield piece
            ended = True
        except BackPressureError:
            ended = True
            raise FullError from None
        except (RayActorError, DeploymentUnavailableError, TaskCancelledError) as error:
            ended = True
            raise GoneError(_first_line(error)) from None
        except (RayError, RayServeException) as error:
            ended = True
            logger.error("a replica failed: %s", _first_line(error))
            raise GoneError(_first_line(error)) from None
        finally:
            if not ended:
                pieces.cancel()

    async def answer_all(self, ask: Ask) -> list[tuple[Head, bytes]]:
        """See Backend. Replicas that die meanwhile are not counted."""
        with suppress(DeploymentUnavailableError):
            answers = await self._handle.broadcast("answer_whole", ask).results_async(return_exceptions=True)
            return [one for one in answers if not isinstance(one, BaseException)]
        return []


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


@serve.ingress()
class Ingress:
    """The front as a deployment. models: handles of the replicas of each model."""

    def __init__(self, models: list[DeploymentHandle], max_body: int, root_path: str) -> None:
        self._front = Front([HandleBackend(handle) for handle in models], max_body=max_body, root_path=root_path)

    async def __serve_build_asgi_app__(self) -> Front:
        return self._front
