"""Builds the one C++ extension, `bagssl_fast._C`; everything else is declared in pyproject.toml.

Compilation is handed to ninja, which rebuilds exactly what a changed source or header touches and
uses every core. `BAGSSL_JPEG=0` builds without libjpeg-turbo, `BAGSSL_NATIVE=1` for this very
machine's instruction set, `BAGSSL_SANITIZE=address,undefined` (or `thread`) under a sanitizer.
"""

import glob
import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

JPEG_PROBE = """
#include <cstddef>
#include <cstdio>
#include <jpeglib.h>
#ifndef LIBJPEG_TURBO_VERSION
#error "not libjpeg-turbo"
#endif
int main() {
  jpeg_decompress_struct d;
  JDIMENSION x = 0, w = 8;
  jpeg_crop_scanline(&d, &x, &w);
  return static_cast<int>(jpeg_skip_scanlines(&d, 1));
}
"""


class NinjaBuildExt(build_ext):
    """A build_ext that writes a ninja file per extension and runs it."""

    def build_extension(self, ext: Extension) -> None:
        cxx = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")[0]
        build_dir = os.path.abspath(os.path.join(self.build_temp, ext.name))
        os.makedirs(build_dir, exist_ok=True)
        output = os.path.abspath(self.get_ext_fullpath(ext.name))
        os.makedirs(os.path.dirname(output), exist_ok=True)

        cflags = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread"]
        cflags += ["-Wall", "-Wextra"]
        # Contracting a*b+c would make the last bit of a pixel depend on the machine.
        cflags += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
        # Where a short loop happens to start moves its time by a tenth on some processors.
        cflags += ["-falign-functions=32", "-falign-loops=32"]
        ldflags = ["-shared", "-pthread"]
        if sys.platform == "darwin":
            ldflags = ["-bundle", "-undefined", "dynamic_lookup"]
        if os.environ.get("BAGSSL_NATIVE") == "1":
            cflags.append("-march=native")
        if sanitizers := os.environ.get("BAGSSL_SANITIZE"):
            flags = [f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer", "-g"]
            cflags += [*flags, "-O1"]
            ldflags += flags
        if os.environ.get("BAGSSL_JPEG") != "0" and jpeg_is_usable(cxx):
            cflags.append("-DBAGSSL_WITH_JPEG=1")
            ldflags.append("-ljpeg")
        includes = [sysconfig.get_path("include"), pybind11.get_include(), os.path.abspath("csrc")]
        cflags += [f"-I{path}" for path in includes]

        lines = [
            f"cxx = {cxx}",
            f"cflags = {' '.join(map(quote, cflags))} {os.environ.get('CXXFLAGS', '')}",
            f"ldflags = {' '.join(map(quote, ldflags))} {os.environ.get('LDFLAGS', '')}",
            "rule compile",
            "  command = $cxx $cflags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $in",
            "rule link",
            "  command = $cxx $in $ldflags -o $out",
            "  description = link $out",
        ]
        objects = []
        for source in ext.sources:
            stem = os.path.splitext(os.path.basename(source))[0]
            objects.append(os.path.join(build_dir, f"{stem}.o"))
            lines.append(f"build {escape(objects[-1])}: compile {escape(os.path.abspath(source))}")
        lines.append(f"build {escape(output)}: link {' '.join(map(escape, objects))}")
        with open(os.path.join(build_dir, "build.ninja"), "w") as file:
            file.write("\n".join(lines) + "\n")
        subprocess.run([sys.executable, "-m", "ninja", "-C", build_dir], check=True)


def quote(flag: str) -> str:
    return shlex.quote(flag).replace("$", "$$")


def escape(path: str) -> str:
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def jpeg_is_usable(cxx: str) -> bool:
    """Whether libjpeg-turbo's headers and library are here; without them simplejpeg decodes."""
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "probe.cpp")
        with open(source, "w") as file:
            file.write(JPEG_PROBE)
        command = [cxx, source, "-ljpeg", "-o", os.path.join(folder, "probe")]
        found = subprocess.run(command, capture_output=True).returncode == 0
    print(f"libjpeg-turbo {'found: JPEG is decoded natively' if found else 'not found'}")
    return found


setup(
    ext_modules=[
        Extension(
            "bagssl_fast._C",
            sources=sorted(glob.glob("csrc/*.cpp")),
            depends=sorted(glob.glob("csrc/*.h")),
        )
    ],
    cmdclass={"build_ext": NinjaBuildExt},
)
