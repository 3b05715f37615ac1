"""Certificates and keys of a federation, in the standard forms: an authority, the server's certificate, a key for each device.

    FOLDER/ca.key              the authority's private key: needed to add devices, and by nobody else; keep it away from the server
    FOLDER/server/             for the server: ca.pem, server.pem, server.key, and devices/K.pub for every device K
    FOLDER/device-K/           for device K: ca.pem and device.key

TLS certifies the server to the devices; Flower's node authentication certifies a device by a signature with its key, whose public half the
server holds. Private keys are readable by their owner only, and are never shown.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

YEARS = 5
"""How long certificates are good."""

CURVE = ec.SECP384R1
"""That of Flower's node authentication."""


class CertificateError(ValueError):
    """Files that are not what they should be, with what would be right."""


def issue(folder: Path, devices: int, names: Sequence[str]) -> list[Path]:
    """Make what is missing in ``folder`` for a server under these names and addresses and for devices 0 to ``devices`` − 1; what is there
    stays. Returns what was made.

    Raises:
        CertificateError: no names or devices, or an authority without its key.
    """
    if devices < 1 or not names:
        raise CertificateError(f"a federation needs a device and a name of its server; got {devices} devices and names {list(names)}")
    made: list[Path] = []
    key, certificate = _authority(folder, made)
    server = folder / "server"
    pem = certificate.public_bytes(Encoding.PEM)
    if not (server / "server.pem").exists():
        own = ec.generate_private_key(CURVE())
        _write(server / "server.key", _private(own), made, secret=True)
        _write(server / "server.pem", _certified(own, key, certificate, names).public_bytes(Encoding.PEM) + pem, made)
    _write(server / "ca.pem", pem, made)
    for k in range(devices):
        place = folder / f"device-{k}"
        if not (place / "device.key").exists():
            own = ec.generate_private_key(CURVE())
            _write(place / "device.key", _private(own), made, secret=True)
            public = own.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
            _write(server / "devices" / f"{k}.pub", public, made)
        _write(place / "ca.pem", pem, made)
    return made


def uncertified(folder: Path, names: Sequence[str]) -> list[str]:
    """Which of the ``names`` the server's certificate in ``folder`` is not for: it stays as it was made.

    Raises:
        CertificateError: what lies there is no certificate.
    """
    path = folder / "server" / "server.pem"
    try:
        found = x509.load_pem_x509_certificate(path.read_bytes()).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return list(names)
    except ValueError as error:
        raise CertificateError(
            f"{path} is no certificate ({error}); delete it and server.key beside it, and fedloom certs makes both"
        ) from error
    return [name for name in names if _named(name) not in found.value]


def public_keys(folder: Path) -> dict[int, bytes]:
    """Each client's public key, PEM, from ``folder/devices/K.pub``.

    Raises:
        CertificateError: there is none, a name that is no number, or numbers that are not 0 to K − 1.
    """
    place = folder / "devices"
    files = sorted(place.glob("*.pub")) if place.is_dir() else []
    if not files:
        raise CertificateError(f"no device's public key in {place}; fedloom certs makes them: give the folder 'server' that it wrote")
    odd = [file.name for file in files if not file.stem.isdecimal()]
    if odd:
        raise CertificateError(f"{place} holds {odd[0]}; a device's key is named by its number, such as 0.pub")
    keys = {int(file.stem): file.read_bytes() for file in files}
    if sorted(keys) != list(range(len(keys))):
        raise CertificateError(f"{place} holds keys of devices {sorted(keys)}; they must be numbered from 0 without a gap")
    return keys


def insist_secret(path: Path) -> Path:
    """The path of a private key, which nobody but its owner may read.

    Raises:
        CertificateError: it is not there, or others may read it.
    """
    if not path.is_file():
        raise CertificateError(f"there is no {path}; fedloom certs makes the folders of server and devices")
    if path.stat().st_mode & 0o077:
        raise CertificateError(f"{path} can be read by others than its owner; close it: chmod 600 {path}")
    return path


def _authority(folder: Path, made: list[Path]) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """The authority's key and certificate, made if there is none."""
    secret, public = folder / "ca.key", folder / "server" / "ca.pem"
    if public.exists():
        if not secret.exists():
            raise CertificateError(
                f"{secret} is not here, and without it nothing can be added to {folder}; bring it back, or name a new folder"
            )
        key = load_pem_private_key(insist_secret(secret).read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return key, x509.load_pem_x509_certificate(public.read_bytes())
    if secret.exists():
        raise CertificateError(f"{secret} is here and {public} is not; bring it back, or name a new folder")
    key = ec.generate_private_key(CURVE())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Fedloom federation")])
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    certificate = (
        _dated(x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    _write(secret, _private(key), made, secret=True)
    return key, certificate


def _certified(
    own: ec.EllipticCurvePrivateKey, key: ec.EllipticCurvePrivateKey, authority: x509.Certificate, names: Sequence[str]
) -> x509.Certificate:
    """The server's certificate."""
    builder = x509.CertificateBuilder().subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])]))
    return (
        _dated(builder.issuer_name(authority.subject).public_key(own.public_key()))
        .add_extension(x509.SubjectAlternativeName([_named(name) for name in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )


def _named(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _dated(builder: x509.CertificateBuilder) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        builder.serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=365 * YEARS))
    )


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write(path: Path, content: bytes, made: list[Path], secret: bool = False) -> None:
    """Write a file that is not there yet; a secret one with nobody else able to read it at any moment."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o644)
    with os.fdopen(number, "wb") as file:
        file.write(content)
    made.append(path)
