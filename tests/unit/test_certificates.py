"""Certificates and keys: what is made, who may read it, what is said when something is not as it should be."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="the extra 'flower' is not installed: pip install 'fedloom[flower]'")
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from fedloom import cli
from fedloom.run.deployment.certificates import CertificateError, insist_secret, issue, public_keys, uncertified, without_private


@pytest.fixture
def made(tmp_path: Path) -> Path:
    issue(tmp_path / "certs", 2, ("example.org", "10.0.0.1"))
    return tmp_path / "certs"


def insist_whole(folder: Path, devices: int = 2) -> None:
    """Insist that the server can begin, that every device believes it, and that it knows every device's key."""
    server = folder / "server"
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(server / "server.pem", server / "server.key")
    known = public_keys(server)
    assert sorted(known) == list(range(devices))
    for k in range(devices):
        private = load_pem_private_key((folder / f"device-{k}" / "device.key").read_bytes(), None)
        assert private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo) == known[k]
        authority = x509.load_pem_x509_certificate((folder / f"device-{k}" / "ca.pem").read_bytes())
        x509.load_pem_x509_certificate((server / "server.pem").read_bytes()).verify_directly_issued_by(authority)


def test_every_private_key_is_its_owners_alone(made: Path) -> None:
    secrets = [made / "ca.key", made / "server" / "server.key", made / "device-0" / "device.key", made / "device-1" / "device.key"]
    assert [path.stat().st_mode & 0o777 for path in secrets] == [0o600] * 4
    assert not list((made / "server").rglob("ca.key")), "the server does not need the authority's key"
    for path in (p for p in made.rglob("*") if p.is_file() and p not in secrets):
        assert b"PRIVATE" not in path.read_bytes()


def test_the_server_is_certified_for_its_names_by_the_authority(made: Path) -> None:
    certificate = x509.load_pem_x509_certificate((made / "server" / "server.pem").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["example.org"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.1"]
    authority = x509.load_pem_x509_certificate((made / "device-1" / "ca.pem").read_bytes())
    certificate.verify_directly_issued_by(authority)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made / "server" / "server.pem", made / "server" / "server.key")


def test_a_devices_public_half_lies_with_the_server_under_its_number(made: Path) -> None:
    for k, public in public_keys(made / "server").items():
        private = load_pem_private_key((made / f"device-{k}" / "device.key").read_bytes(), None)
        assert private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo) == public
    assert sorted(public_keys(made / "server")) == [0, 1]


def test_more_devices_are_added_and_nothing_that_is_there_changes(made: Path) -> None:
    before = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    added = issue(made, 3, ("example.org",))
    assert {path.name for path in added} == {"device.key", "2.pub", "ca.pem"}
    assert all(path.read_bytes() == content for path, content in before.items())
    assert issue(made, 3, ("example.org",)) == []


def test_names_that_the_server_is_not_certified_for_are_told_with_the_mend(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They were dropped, and every device failed later with a hostname mismatch."""
    assert uncertified(made, ("10.0.0.1", "example.org")) == []
    assert uncertified(made, ("10.0.0.2", "example.org", "other.org")) == ["10.0.0.2", "other.org"]
    for names, told in ((["example.org"], False), (["example.org", "other.org"], True)):
        assert cli.main(["certs", str(made), "--devices", "3", "--names", *names]) == 0
        said = capsys.readouterr()
        assert ("not certified for other.org" in said.err, "server.key" in said.err) == (told, told)
        assert "other.org" not in said.out
    for name in ("server.pem", "server.key"):
        (made / "server" / name).unlink()
    assert cli.main(["certs", str(made), "--devices", "3", "--names", "other.org"]) == 0
    assert (uncertified(made, ("other.org",)), capsys.readouterr().err) == ([], "")


def test_a_servers_certificate_that_is_none_is_refused_and_one_without_names_certifies_none(made: Path) -> None:
    pem = made / "server" / "server.pem"
    pem.write_bytes((made / "server" / "ca.pem").read_bytes())
    assert uncertified(made, ("example.org",)) == ["example.org"]
    pem.write_text("nothing")
    with pytest.raises(CertificateError, match=r"server\.pem is no certificate"):
        uncertified(made, ("example.org",))


def test_without_the_authoritys_key_nothing_is_added(made: Path) -> None:
    (made / "ca.key").unlink()
    with pytest.raises(CertificateError, match="is not here, and without it nothing can be added"):
        issue(made, 3, ("example.org",))
    assert not (made / "device-2").exists()


def test_an_authority_of_another_key_is_refused(made: Path, tmp_path: Path) -> None:
    issue(tmp_path / "other", 1, ("example.org",))
    (made / "server" / "ca.pem").write_bytes((tmp_path / "other" / "server" / "ca.pem").read_bytes())
    with pytest.raises(CertificateError, match=r"ca\.pem is not of .*ca\.key; bring the right one back"):
        issue(made, 2, ("example.org",))


@pytest.mark.parametrize("lost", ["server/server.pem", "server/server.key", "server/ca.pem", "server/devices/1.pub", "device-1/ca.pem"])
def test_what_is_lost_is_made_again_of_the_keys_that_are_there(made: Path, lost: str) -> None:
    """A certificate of a new key lay beside the old key, and a device without its public half was gone."""
    keys = {path: path.read_bytes() for path in made.rglob("*.key") if str(path.relative_to(made)) != lost}
    (made / lost).unlink()
    assert made / lost in issue(made, 2, ("example.org", "10.0.0.1"))
    insist_whole(made)
    assert all(path.read_bytes() == content for path, content in keys.items())
    assert issue(made, 2, ("example.org",)) == []


def test_whatever_was_interrupted_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, written = os.replace, list[int]()

    def cut(at: int):
        def replaced(*paths: Path) -> None:
            if len(written) == at:
                raise OSError("killed")
            written.append(1)
            replace(*paths)

        return replaced

    for at in range(9):
        written.clear()
        folder = tmp_path / str(at)
        with monkeypatch.context() as patch, pytest.raises(OSError, match="killed"):
            patch.setattr(os, "replace", cut(at))
            issue(folder, 2, ("example.org",))
        assert len([path for path in folder.rglob("*") if path.is_file()]) == at, "what is there is whole"
        issue(folder, 2, ("example.org",))
        insist_whole(folder)
        assert len([path for path in folder.rglob("*") if path.is_file()]) == 10


def test_what_was_left_of_a_file_that_was_being_written_is_no_hindrance(made: Path) -> None:
    (made / "server" / "server.pem").unlink()
    (made / "server" / "server.pem.new").write_text("half")
    issue(made, 2, ("example.org",))
    insist_whole(made)
    assert not list(made.rglob("*.new"))


def test_what_is_no_key_and_no_certificate_is_refused(made: Path) -> None:
    """An empty key, as a full disk leaves it, was taken for one."""
    for name, told in (("device-1/device.key", "no private key"), ("server/server.pem", "no certificate"), ("ca.key", "no private key")):
        kept = (made / name).read_bytes()
        (made / name).write_bytes(b"")
        with pytest.raises(
            CertificateError, match=f"{Path(name).name} is {told} .*bring it back, or delete it and fedloom certs makes one"
        ):
            issue(made, 2, ("example.org",))
        (made / name).write_bytes(kept)
    (made / "server" / "devices" / "0.pub").write_bytes((made / "server" / "devices" / "1.pub").read_bytes())
    with pytest.raises(CertificateError, match=r"0\.pub is not the public half of .*device\.key; delete 0\.pub"):
        issue(made, 2, ("example.org",))


def test_a_device_that_has_taken_its_key_with_it_keeps_it(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A new one was made here, which the server did not know."""
    before = public_keys(made / "server")
    for path in (made / "device-0").iterdir():
        path.unlink()
    assert cli.main(["certs", str(made), "--devices", "3", "--names", "example.org"]) == 0
    assert "of device 0 only the public half of the key is here" in capsys.readouterr().err
    assert without_private(made, 3) == [0] and not list((made / "device-0").iterdir())
    after = public_keys(made / "server")
    assert sorted(after) == [0, 1, 2] and all(after[k] == before[k] for k in before)


@pytest.mark.parametrize(("devices", "names"), [(0, ("a",)), (1, ())])
def test_a_federation_needs_devices_and_a_name(tmp_path: Path, devices: int, names: tuple[str, ...]) -> None:
    with pytest.raises(CertificateError, match="needs a device and a name"):
        issue(tmp_path, devices, names)


def test_a_key_that_others_can_read_is_refused_with_the_mend(made: Path) -> None:
    path = made / "device-0" / "device.key"
    assert insist_secret(path) == path
    path.chmod(0o640)
    with pytest.raises(CertificateError, match="chmod 600"):
        insist_secret(path)
    with pytest.raises(CertificateError, match="fedloom certs makes"):
        insist_secret(made / "nothing")


def test_public_keys_are_numbered_without_a_gap(made: Path, tmp_path: Path) -> None:
    with pytest.raises(CertificateError, match="no device's public key"):
        public_keys(tmp_path)
    (made / "server" / "devices" / "0.pub").unlink()
    with pytest.raises(CertificateError, match="without a gap"):
        public_keys(made / "server")
    (made / "server" / "devices" / "me.pub").write_bytes(b"")
    with pytest.raises(CertificateError, match="named by its number"):
        public_keys(made / "server")
