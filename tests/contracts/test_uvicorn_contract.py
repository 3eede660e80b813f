"""uvicorn still has what serve/front/uvicorn_internals.py relies on."""

import inspect

import pytest

from serve.front import uvicorn_internals
from tests.support.contracts import Contract, calls, source_mentions, takes

UVICORN = Contract("serve/front/uvicorn_internals.py", uvicorn_internals.ENTRIES)
PROTOCOL = "uvicorn.protocols.http.httptools_impl"


@UVICORN.check("uvicorn.protocols.http.httptools_impl.HttpToolsProtocol")
def _protocol() -> None:
    from uvicorn.protocols.http.flow_control import FlowControl
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

    takes(HttpToolsProtocol, "config", "server_state", "app_state")
    takes(RequestResponseCycle, "default_headers", "keep_alive")
    own = {name for name, value in vars(uvicorn_internals.LimitedProtocol).items() if inspect.isfunction(value)}
    replaced = {name for name in own if hasattr(HttpToolsProtocol, name)}
    assert replaced >= {"connection_made", "connection_lost", "data_received", "pause_writing", "on_url", "on_header"}
    assert replaced >= {"on_message_begin", "on_headers_complete", "on_body", "on_message_complete"}
    assert replaced >= {"resume_writing", "on_response_complete", "send_400_response"}
    calls(HttpToolsProtocol.data_received, "send_400_response(")
    calls(HttpToolsProtocol.on_headers_complete, "default_headers=self.server_state.default_headers", "app = self.app")
    calls(HttpToolsProtocol.on_response_complete, "self.timeout_keep_alive_task = self.loop.call_later(")
    source_mentions(PROTOCOL, "self.headers.append((name, value))", "self.disconnected = False", "response_complete")
    assert {"read_paused", "write_paused"} <= set(inspect.getsource(FlowControl).replace("self.", " ").split())


@UVICORN.check("uvicorn.server.ServerState")
def _state() -> None:
    from uvicorn.server import ServerState

    assert {"connections", "tasks", "default_headers"} <= vars(ServerState()).keys()


@pytest.mark.parametrize("name", UVICORN.entries)
def test_uvicorn(name: str) -> None:
    UVICORN.verify(name)
