// The page's requests to the public API, and the errors in words.

const KEY = "draftsmith-key"; // in sessionStorage: gone with the tab

/** A request that has no answer, or not a whole one; its message is for people. */
class RequestError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status; // of HTTP; 0: there was none
  }
}

// status -> the event; the server's message follows where it says more
const IN_WORDS = {
  400: "The server could not read the request",
  401: "This server needs an API key, and got none or a wrong one. Enter it under “API key”",
  408: "The request took too long to arrive",
  413: "The prompt is larger than the server takes",
  422: "The server refused the request",
  424: "The server failed at this request",
  429: "The server is busy: its queue of requests is full. Try again in a moment",
  500: "The server failed at this request",
  502: "The server behind the proxy does not answer",
  503: "The server takes no requests now",
  504: "The answer took longer than the server allows",
};
const SAYS_IT_ALL = new Set([401, 429]);
// error_type of an error in the middle of a stream -> its status
const TYPES = { validation: 422, overloaded: 429, generation: 424, incomplete_generation: 504, unavailable: 503 };
const NO_CONNECTION = "No connection to the server. It may have been stopped, or the network is down.";
const CUT_OFF = "The connection was lost in the middle of the answer.";

function inWords(status, message) {
  const words = IN_WORDS[status] ?? `The server answered with status ${status}`;
  return new RequestError(message && !SAYS_IT_ALL.has(status) ? `${words}: ${message}` : `${words}.`, status);
}

function storedKey() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return ""; // storage is forbidden: the field alone keeps the key
  }
}

function storeKey(key) {
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // as above
  }
}

/** One request; paths are relative, so that the page also works under a prefix of a reverse proxy. */
async function request(path, key, options = {}) {
  if (!/^[\x21-\x7e]*$/.test(key)) throw new RequestError("The API key has characters that no key has.", 401);
  const headers = { ...(key && { authorization: `Bearer ${key}` }), ...options.headers };
  let answer;
  try {
    answer = await fetch(path, { ...options, headers, cache: "no-store", credentials: "same-origin" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new RequestError(NO_CONNECTION);
  }
  if (answer.ok) return answer;
  let message = "";
  try {
    const { error } = await answer.json();
    message = typeof error === "string" ? error : error?.message ?? "";
  } catch {
    // a proxy's page: the status has to do
  }
  throw inWords(answer.status, message);
}

async function serverInfo(key) {
  return (await request("info", key)).json();
}

/**
 * The events of POST /generate_stream, those that came together in one list.
 * request: {inputs, parameters, seed}; the seed is text, since it may be larger than a number here holds exactly.
 */
async function* generate({ inputs, parameters, seed }, key, signal) {
  const sent = JSON.stringify(parameters).slice(0, -1) + (seed ? `,"seed":${BigInt(seed)}}` : "}");
  const answer = await request("generate_stream", key, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: `{"inputs":${JSON.stringify(inputs)},"parameters":${sent}}`,
    signal,
  });
  let last;
  try {
    for await (const events of serverEvents(answer.body)) {
      const error = events.find((event) => event.error);
      if (error) throw inWords(TYPES[error.error_type] ?? 500, error.error);
      last = events.at(-1);
      yield events;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof RequestError) throw error;
    throw new RequestError(CUT_OFF);
  }
  if (!last?.details) throw new RequestError(CUT_OFF);
}

/** Server-sent events whose data is JSON. */
async function* serverEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split(/\r?\n\r?\n/);
    rest = blocks.pop();
    const data = blocks.map((block) => {
      const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      return lines.map((line) => line.slice("data:".length)).join("\n");
    });
    const events = data.filter(Boolean).map((text) => JSON.parse(text));
    if (events.length) yield events;
  }
}
