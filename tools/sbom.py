"""A software bill of materials in CycloneDX 1.6 JSON. Used by tools/attack_surface.py.

Components have package URLs (github.com/package-url/purl-spec), by which vulnerability scanners
find them.
"""

import hashlib
import json
import uuid
from urllib.parse import quote

PURL_TYPES = {"dpkg": "deb", "apk": "apk", "opkg": "opkg", "pypi": "pypi", "buildroot": "generic"}
SYSTEMS = {"dpkg": "debian", "apk": "alpine"}  # where a tree does not say what it is


def purl(package):
    """The package URL of a package (surface.Package)."""
    kind, name, version = package.kind, package.name, package.version
    system = package.system or SYSTEMS.get(kind, "")
    parts = [PURL_TYPES[kind], system if kind in SYSTEMS else "", name]
    url = "pkg:" + "/".join(quote(part, safe="") for part in parts if part)
    if version:
        url += "@" + quote(version, safe="")
    return url + (f"?arch={quote(package.architecture)}" if package.architecture else "")


def document(name, packages):
    """The bill of what a target of this name holds, as text; the same for the same packages."""
    components = {}
    for package in sorted(set(packages)):
        url = purl(package)
        component = {"type": "library", "bom-ref": url, "name": package.name, "purl": url}
        if package.version:
            component["version"] = package.version
        components[url] = component
    content = json.dumps([name, *components]).encode()
    serial = uuid.UUID(bytes=hashlib.sha256(content).digest()[:16], version=4)
    bill = {"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1}
    bill |= {"serialNumber": f"urn:uuid:{serial}"}
    bill["metadata"] = {"component": {"type": "firmware", "bom-ref": "target", "name": name}}
    bill["components"] = list(components.values())
    return json.dumps(bill, indent=1) + "\n"
