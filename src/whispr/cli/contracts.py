"""`whispr contracts`: writes what is generated, src/whispr/contracts from proto/ and openapi/ from the routes."""

import asyncio
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from whispr.instance.catalog import Entry, present
from whispr.instance.errors import InstanceError
from whispr.kit.process import Context
from whispr.kit.settings import CommonSettings

PACKAGE = Path("whispr") / "contracts"


def write_protos(root: Path, target: Path | None = None) -> None:
    """Compiles every .proto into `target` (default src/): messages, their types, gRPC stubs and their types."""
    sources = sorted((root / "proto" / PACKAGE).glob("*.proto"))
    target = target or root / "src"
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(root / "proto")]
    command += [f"--{kind}_out={target}" for kind in ("python", "pyi", "grpc_python", "mypy_grpc")]
    outcome = subprocess.run(
        [*command, *map(str, sources)], capture_output=True, text=True, check=False, env=_with_plugins()
    )
    if outcome.returncode != 0:
        raise InstanceError(f"protoc failed:\n{outcome.stderr.strip()}")


def _with_plugins() -> dict[str, str]:
    """protoc looks for its plug-ins on the PATH; those of the environment are beside its Python."""
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
    }


def write_openapi(folder: Path) -> None:
    """Writes one OpenAPI document per service into `folder`."""
    folder.mkdir(exist_ok=True)
    entries = present()
    for entry in entries:
        document = asyncio.run(_openapi(entry, [other.name for other in entries]))
        text = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False)
        (folder / f"{entry.name}.json").write_text(text + "\n")


async def _openapi(entry: Entry, neighbours: list[str]) -> dict[str, Any]:
    """The document of a service that is built but never started: nothing it is told to connect to is contacted."""
    nowhere = "127.0.0.1:9"
    common = CommonSettings(mesh=True, **{f"{name}_address": nowhere for name in neighbours})  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.update(entry.variables)
        os.environ.update({name: f"{scratch}/{file}" for name, file in entry.files.items()})
        os.environ[f"WHISPR_{entry.name.upper()}_DATABASE_URL"] = f"postgresql://{nowhere}/unused"
        context = Context(entry.name, common)
        try:
            built = await importlib.import_module(f"whispr.services.{entry.name}.app").build(context)
            document: dict[str, Any] = built.http.openapi()
        finally:
            await context.close()
    return document
