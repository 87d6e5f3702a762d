/** Where the broker is and how an agent proves who it is, as the client wants it told. */

import { readFileSync } from "node:fs";

import { credsAuthenticator, nkeyAuthenticator, type Authenticator, type NodeConnectionOptions } from "@nats-io/transport-node";

/**
 * What the client asks for beside the servers, which it would not look for in a URL: user and password, TLS.
 * `natsUrl` may name several servers, with commas between them. `credentials` is a file with an nkey seed, alone or with
 * a user's JWT; what stands in the URL before the @ does not count then.
 */
export function connectionOptions(natsUrl: string, credentials?: string): NodeConnectionOptions {
  const urls = natsUrl.split(",").map((url) => new URL(url.includes("://") ? url : `nats://${url}`));
  const options: NodeConnectionOptions = { servers: urls.map((url) => url.host) };
  if (urls.some((url) => url.protocol === "tls:")) options.tls = {};
  const named = urls.find((url) => url.username !== "");
  if (credentials) {
    options.authenticator = authenticatorOf(readFileSync(credentials, "utf8"));
  } else if (named) {
    options.user = decodeURIComponent(named.username);
    options.pass = decodeURIComponent(named.password);
  }
  return options;
}

function authenticatorOf(credentials: string): Authenticator {
  const bytes = new TextEncoder();
  if (credentials.includes("BEGIN NATS USER JWT")) return credsAuthenticator(bytes.encode(credentials));
  const seed = credentials.match(/\bSU[A-Z2-7]{56}\b/)?.[0];
  if (seed === undefined) throw new TypeError("the credentials hold neither a user's JWT nor an nkey seed (SU...)");
  return nkeyAuthenticator(bytes.encode(seed));
}
