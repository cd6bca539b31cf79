"""Errors in the format of the store that is asked, as the real ones send them."""

import json

from tests.support.servers.faults import Fault

# What Azure calls it. Where it knows no such conflict, the nearest: it says that a blob is there.
AZURE = {
    Fault.INTERNAL_ERROR: (500, "InternalError"),
    Fault.SLOW_DOWN: (503, "ServerBusy"),
    Fault.TOO_MANY_REQUESTS: (429, "TooManyRequests"),
    Fault.ACCESS_DENIED: (403, "AuthorizationPermissionMismatch"),
    Fault.EXPIRED_TOKEN: (403, "AuthenticationFailed"),
    Fault.NOT_FOUND: (404, "BlobNotFound"),
    Fault.CONFLICT: (409, "BlobAlreadyExists"),
}
REASONS = {
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    409: "Conflict",
    429: "Too Many Requests",
    500: "Internal Server Error",
    503: "Service Unavailable",
}


def error_answer(root: str, fault: Fault, method: str) -> tuple[int, bytes]:
    """Status and whole answer, after which the connection ends.

    Args:
        root: URL whose scheme tells the format.
        fault: One of those that are an error.
        method: Of the request; HEAD gets no body.
    """
    status, code = int(fault.value[:3]), fault.value[4:]
    headers = {}
    if root.startswith("az://"):
        status, code = AZURE[fault]
        headers["x-ms-error-code"] = code
    if root.startswith("gs://"):
        error = {"code": status, "message": "injected", "errors": [{"reason": code, "message": "injected"}]}
        kind, body = "application/json", json.dumps({"error": error}).encode()
    else:
        text = f"<Error><Code>{code}</Code><Message>injected</Message><RequestId>0</RequestId></Error>"
        kind, body = "application/xml", f'<?xml version="1.0" encoding="UTF-8"?>\n{text}'.encode()
    headers |= {"Content-Type": kind, "Content-Length": str(len(body)), "Connection": "close"}
    lines = [f"HTTP/1.1 {status} {REASONS[status]}", *(f"{name}: {value}" for name, value in headers.items())]
    return status, "\r\n".join([*lines, "", ""]).encode() + (b"" if method == "HEAD" else body)
