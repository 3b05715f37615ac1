"""Certificates and keys of a federation, in the standard forms: an authority, the server's certificate, a key for each device.

    FOLDER/ca.key              the authority's private key: needed to add devices, and by nobody else; keep it away from the server
    FOLDER/server/             for the server: ca.pem, server.pem, server.key, and devices/K.pub for every device K
    FOLDER/device-K/           for device K: ca.pem and device.key

TLS certifies the server to the devices; Flower's node authentication certifies a device by a signature with its key, whose public half the
server holds. Private keys are readable by their owner only, and are never shown.

A private key is written before what is made of it, and every file is there as a whole or not at all. So whatever was interrupted, or lost a
file, is mended by the same command: certificates and public halves are made of the keys that are there.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedloom.folders import replacing

YEARS = 5
"""How long certificates are good."""

CURVE = ec.SECP384R1
"""That of Flower's node authentication."""


class CertificateError(ValueError):
    """Files that are not what they should be, with what would be right."""


def issue(folder: Path, devices: int, names: Sequence[str]) -> list[Path]:
    """Make what is missing in ``folder`` for a server under these names and addresses and for devices 0 to ``devices`` − 1; keys that are
    there stay, and so does the server's certificate where it is of its key. For a device whose public half alone is here
    (:func:`without_private`) nothing is made: it has its key. Returns what was made.

    Raises:
        CertificateError: no names or devices, an authority without its key, or a file that is no key, no certificate, or of another key.
    """
    if devices < 1 or not names:
        raise CertificateError(f"a federation needs a device and a name of its server; got {devices} devices and names {list(names)}")
    made: list[Path] = []
    key, certificate = _authority(folder, made)
    server, pem = folder / "server", certificate.public_bytes(Encoding.PEM)
    own, place = _key(server / "server.key", made), server / "server.pem"
    if not place.exists() or _certificate(place).public_key() != own.public_key():
        _write(place, _certified(own, key, certificate, names).public_bytes(Encoding.PEM) + pem, made)
    there = set(range(devices)) - set(without_private(folder, devices))
    for k in sorted(there):
        private, public = folder / f"device-{k}" / "device.key", server / "devices" / f"{k}.pub"
        half = _key(private, made).public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        if not public.exists():
            _write(public, half, made)
        elif public.read_bytes() != half:
            raise CertificateError(
                f"{public} is not the public half of {private}; delete {public.name}, and fedloom certs makes it of this key, or bring "
                "back the key that the device has"
            )
        authority = private.with_name("ca.pem")
        if not authority.exists() or authority.read_bytes() != pem:
            _write(authority, pem, made)
    return made


def without_private(folder: Path, devices: int) -> list[int]:
    """The devices, of the first ``devices``, whose public keys lie in ``folder`` without the private ones."""
    places = [(folder / "server" / "devices" / f"{k}.pub", folder / f"device-{k}" / "device.key") for k in range(devices)]
    return [k for k, (public, private) in enumerate(places) if public.exists() and not private.exists()]


def uncertified(folder: Path, names: Sequence[str]) -> list[str]:
    """Which of the ``names`` the server's certificate in ``folder`` is not for: it stays as it was made.

    Raises:
        CertificateError: what lies there is no certificate.
    """
    try:
        found = _certificate(folder / "server" / "server.pem").extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return list(names)
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


def _key(path: Path, made: list[Path]) -> ec.EllipticCurvePrivateKey:
    """The private key at ``path``, made if there is none.

    Raises:
        CertificateError: what is there is no such key, or others can read it.
    """
    if not path.exists():
        own = ec.generate_private_key(CURVE())
        _write(path, own.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), made, secret=True)
        return own
    content = insist_secret(path).read_bytes()
    try:
        key = load_pem_private_key(content, None)
    except (ValueError, TypeError) as error:
        raise _no("private key", path, error) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise _no("private key of an elliptic curve", path, "of another kind")
    return key


def _certificate(path: Path) -> x509.Certificate:
    """The first certificate of the file.

    Raises:
        CertificateError: it holds none.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except ValueError as error:
        raise _no("certificate", path, error) from error


def _no(what: str, path: Path, why: object) -> CertificateError:
    return CertificateError(f"{path} is no {what} ({why}); bring it back, or delete it and fedloom certs makes one")


def _authority(folder: Path, made: list[Path]) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """The authority's key and certificate, made if they are not there. Of one key every certificate is as good: whoever has an earlier one
    believes what was signed under a later."""
    secret, public = folder / "ca.key", folder / "server" / "ca.pem"
    if public.exists() and not secret.exists():
        raise CertificateError(
            f"{secret} is not here, and without it nothing can be added to {folder}; bring it back, or name a new folder"
        )
    key = _key(secret, made)
    if public.exists():
        found = _certificate(public)
        if found.public_key() != key.public_key():
            raise CertificateError(f"{public} is not of {secret}; bring the right one back, or name a new folder")
        return key, found
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Fedloom federation")])
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    certificate = (
        _dated(x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    _write(public, certificate.public_bytes(Encoding.PEM), made)
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


def _write(path: Path, content: bytes, made: list[Path], secret: bool = False) -> None:
    """Write a file, whole or not at all; a secret one with nobody else able to read it at any moment."""
    with replacing(path, "new", 0o600 if secret else 0o644) as file:
        file.write(content)
    made.append(path)
