import subprocess
import sys


def test_importing_the_room_loads_no_optional_package() -> None:
    code = (
        "import sys, sft.models; "
        "print(sorted({'timm', 'torchvision', 'PIL'} & {m.split('.')[0] for m in sys.modules}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
