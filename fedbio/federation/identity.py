"""What a site proves to other sites that it is, with the key of its certificate."""

from __future__ import annotations

__all__ = ["SiteIdentity"]

from dataclasses import dataclass

from fedbio.errors import RefusedError
from fedbio.transport import Credentials


@dataclass(frozen=True, slots=True)
class SiteIdentity:
    """Signs in a site's name; the private key stays in its file and is read for each signature.

    Parameters
    ----------
    credentials : Credentials
    """

    credentials: Credentials

    def authority(self) -> bytes:
        """Return the certificate of the federation's authority, PEM."""
        return self.credentials.read()[0]

    def certificate(self) -> bytes:
        """Return the site's certificate, DER: two of them may lie side by side in a message."""
        # imported here: only who signs pays for the import
        from cryptography import x509
        from cryptography.hazmat.primitives import serialization

        certificate = x509.load_pem_x509_certificate(self.credentials.read()[1])
        return certificate.public_bytes(serialization.Encoding.DER)

    def sign(self, statement: bytes) -> bytes:
        """Return the signature (ECDSA over SHA-256, DER) of a statement.

        Raises
        ------
        RefusedError
            If the site's key is of another kind than start-up kits have.
        """
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key = serialization.load_pem_private_key(self.credentials.read()[2], password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise RefusedError(
                f"{self.credentials.key}: not an elliptic curve key, with which sites sign for each other; ask the "
                "coordinator for a start-up kit"
            )
        return key.sign(statement, ec.ECDSA(hashes.SHA256()))
