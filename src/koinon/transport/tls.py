"""Both sides of a TLS 1.3 connection show a certificate of the same project; nothing older, and nobody anonymous."""

from __future__ import annotations

import ssl

from koinon.site.kit import Kit


def server_context(kit: Kit) -> ssl.SSLContext:
    """For a server: whoever connects must show a certificate that the project's root or the server's issuer signed.

    No session is taken up again, so every connection is verified anew.  Who connected is in the certificate
    (koinon.site.kit.identity); that it was not revoked, and still holds, is to be asked at every call.
    """
    context = _context(kit, ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    context.num_tickets = 0
    return context


def client_context(kit: Kit) -> ssl.SSLContext:
    """For a site or an admin: the server must have the role of one, and the address that was dialled.

    Only a server's certificate is for use by a server (RFC 5280, extended key usage), and only the project's root
    can make one: OpenSSL refuses every other in the handshake.
    """
    context = _context(kit, ssl.PROTOCOL_TLS_CLIENT)
    context.hostname_checks_common_name = False
    context.check_hostname, context.verify_mode = True, ssl.CERT_REQUIRED
    return context


def _context(kit: Kit, protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_verify_locations(kit.root)
    context.load_cert_chain(kit.certificate, kit.key)
    return context
