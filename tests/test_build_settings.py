"""setup.py's environment: a value that cannot be used ends the build in one message with the variable, its value
and what would be right.
"""

import sys

import pytest
from test_install import pristine, run, source  # noqa: F401
from test_install_cuda import nvcc, script  # noqa: F401


@pytest.fixture
def tool(tmp_path):
    """An executable script."""

    def make(text, name="tool"):
        path = tmp_path / name
        path.write_text(text)
        path.chmod(0o755)
        return str(path)

    return make


@pytest.mark.parametrize(
    "name, values",
    [
        ("COORDATT_FAST_NO_BUILD", {"": None, "0": False, "1": True, " 1 ": True}),
        ("FORCE_CUDA", {"": None, "0": False, "1": True}),
    ],
)
def test_switches(script, monkeypatch, name, values):  # noqa: F811
    monkeypatch.delenv(name, raising=False)
    assert script["switch"](name) is None
    for value, meaning in values.items():
        monkeypatch.setenv(name, value)
        assert script["switch"](name) is meaning
    for value in ("yes", "true", "2", "-1", "01"):
        monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit, match=f"^coordatt_fast: {name}={value}: expected 0 or 1$"):
            script["switch"](name)


COMPILERS = {
    "silent": "#!/bin/sh\nexit 0\n",
    "failing": "#!/bin/sh\necho out of order >&2; exit 3\n",
    "echo": "#!/bin/sh\necho $*\n",
    "no script": "\x7fELF nonsense",
    "no headers": '#!/bin/sh\ncase "$*" in *-E*) echo no vector here >&2; exit 1;; *) echo x86_64-linux;; esac\n',
}


@pytest.mark.parametrize("kind", COMPILERS)
def test_broken_compiler(script, monkeypatch, tool, kind):  # noqa: F811
    """There is one, so it is no silent install without the library."""
    path = tool(COMPILERS[kind])
    monkeypatch.setenv("CXX", path)
    with pytest.raises(SystemExit) as ended:
        script["Toolchain"]()
    message = str(ended.value)
    assert message.startswith(f"coordatt_fast: CXX={path}: the C++ compiler is broken: ")
    assert "COORDATT_FAST_NO_BUILD=1" in message
    assert {"failing": "status 3: out of order", "no headers": "no vector here"}.get(kind, "") in message


def test_compiler_that_is_no_command(script, monkeypatch):  # noqa: F811
    monkeypatch.setenv("CXX", "g++ '")
    with pytest.raises(SystemExit, match="CXX=g.. ': No closing quotation; expected a command"):
        script["find_compiler"]()
    for value in ("/nonexistent/g++", " ", "/"):
        monkeypatch.setenv("CXX", value)
        with pytest.raises(script["Skip"], match=f"no C.. compiler: CXX={value}".replace("+", ".")):
            script["find_compiler"]()


def test_broken_compiler_ends_the_install(source):  # noqa: F811
    """Without a traceback."""
    command = (sys.executable, "setup.py", "build_ext", "--build-lib", "lib")
    result = run(*command, cwd=source, env={"CXX": "/bin/false", "FORCE_CUDA": "0"})
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "coordatt_fast: CXX=/bin/false: the C++ compiler is broken: " in result.stderr


def test_sanitizers(script, monkeypatch):  # noqa: F811
    monkeypatch.setenv("SANITIZE", "address,undefined")
    monkeypatch.setenv("FORCE_CUDA", "0")
    assert script["mode"]()[0] == "debug-address-undefined"
    assert script["Toolchain"]().cuda is None
    monkeypatch.setenv("SANITIZE", "address,nonsense")
    with pytest.raises(
        SystemExit, match="SANITIZE=address,nonsense: no -fsanitize=nonsense in .* expected address"
    ):
        script["Toolchain"]()


@pytest.mark.parametrize(
    "value, mode", [("1", "debug"), ("0", "release"), ("", "release"), ("app:*", "release")]
)
def test_debug(script, monkeypatch, value, mode):  # noqa: F811
    """Other programs use the name, with values of their own."""
    monkeypatch.setenv("DEBUG", value)
    assert script["mode"]()[0] == mode


@pytest.mark.parametrize("text", ["#!/bin/sh\nexit 2\n", "#!/bin/sh\necho I am nvcc\n", "no script"])
def test_broken_nvcc(script, tool, text):  # noqa: F811
    path = tool(text, "nvcc")
    with pytest.raises(
        SystemExit, match=f"nvcc is broken: {path} .*set CUDA_HOME to another, or FORCE_CUDA=0"
    ):
        script["Cuda"](path)


@pytest.mark.parametrize("wanted", [";", " , ", "8.0a", "8.6f"])
def test_architectures_that_nvcc_has_not(script, nvcc, monkeypatch, wanted):  # noqa: F811
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    if wanted.strip():
        with pytest.raises(SystemExit, match="^coordatt_fast: TORCH_CUDA_ARCH_LIST=.*FORCE_CUDA=0$"):
            script["Cuda"](str(nvcc()))


@pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH"])
def test_cuda_home_without_nvcc(script, monkeypatch, capsys, tmp_path, name):  # noqa: F811
    monkeypatch.setenv(name, str(tmp_path))
    script["find_nvcc"]()
    assert f"coordatt_fast: {name}={tmp_path} has no bin/nvcc" in capsys.readouterr().out


@pytest.mark.parametrize("value", ["some", "0", "-2", "1.5", "9" * 30])
def test_max_jobs(script, monkeypatch, value):  # noqa: F811
    monkeypatch.setenv("MAX_JOBS", value)
    with pytest.raises(SystemExit, match=f"^coordatt_fast: MAX_JOBS={value}: expected a positive number"):
        script["jobs"]()
    for value, option in (("", []), ("3", ["-j", "3"])):
        monkeypatch.setenv("MAX_JOBS", value)
        assert script["jobs"]() == option
