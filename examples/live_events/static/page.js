// Two panes, each a sign-in of its own: its session cookie is for its path, and so is all that it asks for.
// Whatever came from a user is put into the page as text, never as HTML.

import { UserEvents } from "./ucm-events.js";

const PANES = [
  { path: "/left", user: "alice" },
  { path: "/right", user: "bob" },
];

class Pane {
  #path;
  #root;
  #events = null;

  constructor(path, user, root) {
    this.#path = path;
    this.#root = root;
    root.id = path.slice(1);
    root.setAttribute("aria-label", `Pane ${root.id}`);
    const signIn = this.#find(".sign-in");
    signIn.elements.user.value = user;
    signIn.addEventListener("submit", (submitted) => this.#signIn(submitted));
    this.#find(".send").addEventListener("submit", (submitted) => this.#send(submitted));
    this.#find(".drop").addEventListener("click", () => this.#events.drop());
    this.#find(".revoke").addEventListener("click", () => this.#ask("POST", "revoke"));
    this.#resume();
  }

  async #resume() {
    const answer = await this.#ask("GET", "whoami");
    if (answer.status === 200) this.#begin(answer.body.user);
  }

  async #signIn(submitted) {
    submitted.preventDefault();
    const { user, password } = submitted.target.elements;
    const answer = await this.#ask("POST", "login", { user: user.value, password: password.value });
    password.value = "";
    if (answer.status === 200) this.#begin(answer.body.user);
    else this.#say(".problem", told(answer));
  }

  #begin(user) {
    this.#find(".log").replaceChildren();
    for (const part of [".problem", ".answer", ".position"]) this.#say(part, "");
    this.#say(".user", user);
    this.#say(".avatar", user[0].toUpperCase());
    this.#root.dataset.user = user;
    this.#show(true);
    this.#events = new UserEvents(`${this.#path}/events`, { mayReconnect: () => this.#maySignInStill() })
      .on("message", (event) => this.#event(event, event.data.text))
      .on("events_missed", (event) => this.#event(event, "some events could not be replayed"))
      .onState((state, details) => this.#state(state, details));
    this.#events.connect();
  }

  async #send(submitted) {
    submitted.preventDefault();
    const { text } = submitted.target.elements;
    const to = submitted.submitter.value;
    const answer = await this.#ask("POST", "send", { to, text: text.value });
    this.#say(".answer", `to ${to}: ${told(answer)}`);
    this.#find(".answer").classList.toggle("refused", answer.status !== 200);
  }

  #event(event, text) {
    this.#line(event.type, `#${event.sequence}`, text, event.timestamp.slice(11, 19));
    this.#say(".position", `epoch ${event.epoch} · sequence ${event.sequence}`);
  }

  #state(state, { code, reason, wait, epoch, sequence }) {
    this.#find(".state").dataset.state = state;
    this.#find(".drop").disabled = state !== "open";
    const why = [code ?? "", reason].filter(Boolean).join(" ");
    if (state === "connecting") this.#say(".state", "connecting");
    if (state === "connecting" && epoch !== null) this.#line("note", "", `came back: last_sequence=${sequence}`);
    if (state === "open") this.#say(".state", "live");
    if (state === "waiting") {
      this.#say(".state", `again in ${(wait / 1000).toFixed(1)} s`);
      this.#line("note", "", `connection closed: ${why}`);
    }
    if (state === "ended") {
      this.#say(".state", "ended");
      this.#show(false);
      this.#say(".problem", `Ended: ${why}`);
    }
  }

  /** False once the session is over; while the server cannot be reached, nobody knows, and it is tried again. */
  async #maySignInStill() {
    return (await this.#ask("GET", "whoami")).status !== 401;
  }

  async #ask(method, what, data) {
    const body = data === undefined ? undefined : JSON.stringify(data);
    const headers = data === undefined ? {} : { "Content-Type": "application/json" };
    try {
      const answer = await fetch(`${this.#path}/${what}`, { method, headers, body });
      return { status: answer.status, body: await answer.json() };
    } catch {
      return { status: 0, body: { detail: "The server cannot be reached." } };
    }
  }

  #line(kind, number, text, time = "") {
    const line = document.createElement("li");
    line.className = kind;
    for (const [name, value] of Object.entries({ number, text, time })) {
      const part = document.createElement("span");
      part.className = name;
      part.textContent = value;
      line.append(part);
    }
    this.#find(".log").append(line);
    line.scrollIntoView({ block: "nearest" });
  }

  #show(isSignedIn) {
    this.#find(".sign-in").hidden = isSignedIn;
    this.#find(".signed-in").hidden = !isSignedIn;
  }

  #say(where, text) {
    this.#find(where).textContent = text;
  }

  #find(selector) {
    return this.#root.querySelector(selector);
  }
}

function told({ status, body }) {
  if (status !== 200) return `${status || "no answer"}, ${body.detail}`;
  return `delivered ${body.delivered}, queued ${body.queued}, dropped ${body.dropped}${body.kept ? ", kept" : ""}`;
}

for (const { path, user } of PANES) {
  const root = document.querySelector("template").content.cloneNode(true).querySelector("section");
  document.querySelector("main").append(root);
  new Pane(path, user, root);
}
