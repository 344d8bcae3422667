"""Certificates and keys: whom a site talks to, and who a SuperNode is.

    certificates   a certificate authority of the run's own and the server's certificate, signed by it
    key pair       a site's: the private key stays at the site, the public one is registered at the server

    folder/ca.pem        to every site: `nnunet-dp fed site` checks the server with it
    folder/server.pem    the server's certificate, for the named hosts and for this machine
    folder/server.key    stays at the server, readable by its owner only

Whoever has ``ca.pem`` can be sure to talk to the server that made it; the authority's own private key is thrown away
once the server's certificate is signed, so nothing else can ever be signed by it.

Source: Flower 1.41 accepts PEM for TLS and OpenSSH keys on a NIST curve for SuperNodes (P-384 is the one it names).
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from nnunet_dp.errors import UsageRefusal

_HERE = ("localhost", "127.0.0.1")  # the SuperLink's own processes reach it there


@dataclass(frozen=True)
class Certificates:
    """What a SuperLink with TLS is started with.

    Attributes:
        authority: certificate of the authority, PEM.
        certificate: the server's, PEM.
        key: the server's private key, PEM.
    """

    authority: Path
    certificate: Path
    key: Path

    @classmethod
    def within(cls, folder: Path) -> Certificates:
        """The files that ``make_certificates`` writes into a folder."""
        return cls(folder / "ca.pem", folder / "server.pem", folder / "server.key")


def make_certificates(folder: Path, hosts: Sequence[str] = (), days: int = 365) -> Certificates:
    """Write an authority and a server certificate that it signed.

    Args:
        folder: of the server; made where absent.
        hosts: names and addresses under which sites reach the server; this machine's own is always among them.
        days: until both expire.

    Raises:
        UsageRefusal: when the folder already has some: sites trust those.
    """
    made = Certificates.within(folder)
    for file in (made.authority, made.certificate, made.key):
        _refuse_existing(file)
    folder.mkdir(parents=True, exist_ok=True)
    authority_key, server_key = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    authority_name = _name("nnunet-dp federated authority")
    constraint = x509.BasicConstraints(ca=True, path_length=0), True
    authority = _builder(authority_name, authority_name, authority_key, days).add_extension(*constraint)
    signing = authority.add_extension(_usage(sign=True), critical=True).sign(authority_key, hashes.SHA384())
    names = x509.SubjectAlternativeName([_general_name(host) for host in dict.fromkeys((*hosts, *_HERE))])
    server = _builder(_name("nnunet-dp federated server"), authority_name, server_key, days)
    for extension, critical in (
        (names, False),
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_usage(sign=False), True),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
        (x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), False),
    ):
        server = server.add_extension(extension, critical)
    made.authority.write_bytes(signing.public_bytes(serialization.Encoding.PEM))
    made.certificate.write_bytes(
        server.sign(authority_key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)
    )
    _write_private(made.key, server_key, serialization.PrivateFormat.PKCS8)
    return made


def make_key_pair(private_file: Path) -> Path:
    """Write a site's private key and, beside it with ``.pub``, its public key; returns the public key's file.

    Raises:
        UsageRefusal: when one of them exists, the public one alone, too: the server may know it.
    """
    public_file = private_file.with_name(private_file.name + ".pub")
    for file in (private_file, public_file):
        _refuse_existing(file)
    private_file.parent.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP384R1())
    _write_private(private_file, key, serialization.PrivateFormat.OpenSSH)
    encoding, form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    public_file.write_bytes(key.public_key().public_bytes(encoding, form) + b"\n")
    return public_file


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))  # clocks of hospitals differ
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=sign, crl_sign=sign, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _refuse_existing(file: Path) -> None:
    if file.exists():
        raise UsageRefusal(f"{file.name} should not exist yet, found one: keep it, or name another folder")


def _write_private(file: Path, key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> None:
    content = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
        stream.write(content)
