// One user's events over a WebSocket: a client for UserContextMiddleware, without dependencies.
//
//   const events = new UserEvents("/events");
//   events.on("message", (event) => show(event.data));
//   events.connect();
//
// It reconnects after a while, which grows, and names the last event that it had, so that the server replays what came
// in between. It stops when the server closes with 1008: this user may not go on.

const MAY_NOT_GO_ON = 1008;

export class UserEvents {
  #url;
  #mayReconnect;
  #firstWait;
  #longestWait;
  #protocols;
  #handlers = new Map();
  #textHandlers = [];
  #stateHandlers = [];
  #socket = null;
  #timer = null;
  #attempts = 0;
  #openedAt = null;
  #isWanted = false;

  /** The epoch and the sequence of the last event. The epoch is null before there was one. */
  epoch = null;
  sequence = 0;

  /**
   * `mayReconnect` is asked before each reconnect, and answers, itself or by a promise, whether to go on: a browser
   * does not tell a script why a handshake was refused, and 401 is not a thing to try again. One that throws has not
   * said no. `protocols` are those that the WebSocket is to offer. Waits are in milliseconds.
   */
  constructor(url, { mayReconnect = () => true, protocols = [], firstWait = 500, longestWait = 30_000 } = {}) {
    this.#url = url;
    this.#protocols = protocols;
    this.#mayReconnect = mayReconnect;
    this.#firstWait = firstWait;
    this.#longestWait = longestWait;
  }

  /** Call `handler(event)` for each event of a type. `event` is the envelope. Returns this. */
  on(type, handler) {
    this.#handlers.set(type, [...(this.#handlers.get(type) ?? []), handler]);
    return this;
  }

  /** Call `handler(text)` for each message that is no event, but the application's own. Returns this. */
  onText(handler) {
    this.#textHandlers.push(handler);
    return this;
  }

  /**
   * Call `handler(state, details)` when the state changes: "connecting" {epoch, sequence}, "open" {}, "waiting"
   * {code, reason, wait}, "ended" {code, reason}. The code is null where it is not the server that ended it. Returns
   * this.
   */
  onState(handler) {
    this.#stateHandlers.push(handler);
    return this;
  }

  /** Begin, or begin again after the end. While it runs, or waits to reconnect, this does nothing. */
  connect() {
    if (this.#isWanted) return;
    this.#isWanted = true;
    this.#attempts = 0;
    this.#open();
  }

  /** Send a text to the application. Answers whether there is a connection to send it on. */
  send(text) {
    if (this.#socket?.readyState !== WebSocket.OPEN) return false;
    this.#socket.send(text);
    return true;
  }

  /** Let go of the connection and come back, as after an interruption. */
  drop() {
    this.#socket?.close(4000, "dropped");
  }

  /** End for good. */
  close() {
    if (this.#isWanted) this.#end(null, "closed");
  }

  #open() {
    const url = new URL(this.#url, location.href);
    url.protocol = url.protocol.replace("http", "ws");
    // In a first connection 0 without an epoch: whatever is kept.
    url.searchParams.set("last_sequence", this.sequence);
    if (this.epoch !== null) url.searchParams.set("epoch", this.epoch);
    this.#tell("connecting", { epoch: this.epoch, sequence: this.sequence });
    const socket = (this.#socket = new WebSocket(url, this.#protocols));
    this.#openedAt = null;
    socket.onopen = () => {
      this.#openedAt = performance.now();
      this.#tell("open", {});
    };
    socket.onmessage = (message) => this.#receive(message.data);
    socket.onclose = ({ code, reason }) => this.#closed(code, reason);
  }

  #receive(text) {
    const event = eventIn(text);
    if (event === null) {
      for (const handler of this.#textHandlers) handler(text);
      return;
    }
    const isKnown = event.epoch === this.epoch && event.sequence <= this.sequence;
    if (isKnown && event.type !== "events_missed") return;
    this.epoch = event.epoch;
    this.sequence = event.sequence;
    for (const handler of this.#handlers.get(event.type) ?? []) handler(event);
  }

  #closed(code, reason) {
    this.#socket = null;
    if (code === MAY_NOT_GO_ON) {
      this.#end(code, reason);
      return;
    }
    // A connection that did not hold is no reason to begin anew with short waits.
    const held = this.#openedAt === null ? 0 : performance.now() - this.#openedAt;
    if (held > this.#longestWait) this.#attempts = 0;
    const longest = Math.min(this.#firstWait * 2 ** this.#attempts, this.#longestWait);
    const wait = longest * (0.5 + Math.random() / 2); // not all clients of a server at the same moment
    this.#attempts += 1;
    this.#timer = setTimeout(() => this.#reconnect(), wait);
    this.#tell("waiting", { code, reason, wait });
  }

  async #reconnect() {
    const timer = this.#timer;
    let mayReconnect = true; // also where the answer cannot be had, as without a network
    try {
      mayReconnect = await this.#mayReconnect();
    } catch {}
    if (timer !== this.#timer) return; // ended, or begun again, in the meantime
    if (mayReconnect) this.#open();
    else this.#end(null, "signed out");
  }

  #end(code, reason) {
    this.#isWanted = false;
    clearTimeout(this.#timer);
    this.#timer = null;
    if (this.#socket !== null) {
      this.#socket.onopen = this.#socket.onmessage = this.#socket.onclose = null;
      this.#socket.close();
      this.#socket = null;
    }
    this.#tell("ended", { code, reason });
  }

  #tell(state, details) {
    for (const handler of this.#stateHandlers) handler(state, details);
  }
}

/** The envelope of an event; null for what is none. */
function eventIn(text) {
  try {
    const event = JSON.parse(text);
    return typeof event?.sequence === "number" && typeof event.epoch === "string" ? event : null;
  } catch {
    return null;
  }
}
