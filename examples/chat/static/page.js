// One tab: one sign-in, which lives as long as the tab does, and one connection for questions, answers and events.
// Whatever came from a user or a model is put into the page as text, never as HTML.

import { UserEvents } from "/static/ucm-events.js";

const EVENTS = {
  agent_started: () => "",
  agent_thinking: ({ text }) => text ?? "",
  tool_executing: ({ tool }) => tool,
  tool_completed: ({ tool, seconds, error }) => `${tool}, ${milliseconds(seconds)}${error ? `: ${error}` : ""}`,
  agent_completed: ({ seconds }) => milliseconds(seconds),
  agent_failed: ({ seconds, reason }) => `${reason}, ${milliseconds(seconds)}`,
};

class Tab {
  #session = null;
  #connection = null;
  #conversation = "";
  #turn = null; // what is being answered: its id, and the line that the answer goes to
  #turns = 0;

  constructor() {
    find(".sign-in").addEventListener("submit", (submitted) => this.#signIn(submitted));
    find(".sign-out").addEventListener("click", () => this.#ask("POST", "/sign-out"));
    find(".open").addEventListener("submit", (submitted) => this.#openNamed(submitted));
    find(".ask").addEventListener("submit", (submitted) => this.#askAgent(submitted));
    find(".stop").addEventListener("click", () => this.#tell({ type: "stop" }));
    const question = find(".ask textarea");
    question.addEventListener("keydown", (pressed) => {
      if (pressed.key !== "Enter" || pressed.shiftKey || pressed.isComposing) return;
      pressed.preventDefault();
      if (this.#turn === null) pressed.target.form.requestSubmit();
    });
    for (const example of document.querySelectorAll(".example")) {
      example.addEventListener("click", () => {
        question.value = example.textContent;
        question.focus();
      });
    }
    this.#showModel();
    this.#resume();
  }

  async #showModel() {
    const { status, body } = await this.#ask("GET", "/model");
    if (status !== 200) return;
    const isOffline = body.model === null;
    find(".model").classList.toggle("offline", isOffline);
    say(".model", isOffline ? "Offline: a scripted model answers. CHAT_MODEL names a real one." : `Model: ${body.model}`);
  }

  async #resume() {
    this.#session = sessionStorage.getItem("session");
    if (this.#session === null) return;
    const answer = await this.#ask("GET", "/whoami");
    if (answer.status === 200) this.#begin(answer.body.user);
    else this.#end(answer.status === 401 ? "You are signed out." : answer.body.detail);
  }

  async #signIn(submitted) {
    submitted.preventDefault();
    const answer = await this.#ask("POST", "/sign-in", { token: submitted.submitter.value });
    if (answer.status !== 200) {
      say(".problem", answer.body.detail);
      return;
    }
    this.#session = answer.body.session;
    sessionStorage.setItem("session", this.#session);
    this.#begin(answer.body.user);
  }

  #begin(user) {
    document.title = `${user}: chat`;
    document.documentElement.dataset.user = user;
    say(".name", user);
    say(".avatar", user[0].toUpperCase());
    say(".problem", "");
    find(".events").replaceChildren();
    this.#show(true);
    this.#connection = new UserEvents("/talk", {
      mayReconnect: async () => (await this.#ask("GET", "/whoami")).status !== 401,
      protocols: ["chat", `session.${this.#session}`],
    });
    for (const type of Object.keys(EVENTS)) this.#connection.on(type, (event) => this.#event(event));
    this.#connection.onText((text) => this.#hear(JSON.parse(text))).onState((state) => this.#state(state));
    this.#connection.connect();
    this.#open(sessionStorage.getItem("conversation") ?? "main");
  }

  #end(why) {
    for (const kept of ["session", "conversation"]) sessionStorage.removeItem(kept);
    delete document.documentElement.dataset.user;
    document.title = "Chat";
    find(".lines").replaceChildren();
    find(".events").replaceChildren();
    this.#settle();
    this.#show(false);
    say(".problem", why);
  }

  #openNamed(submitted) {
    submitted.preventDefault();
    this.#open(submitted.target.elements.name.value.trim());
  }

  async #open(name) {
    this.#conversation = name;
    find(".open").elements.name.value = name;
    sessionStorage.setItem("conversation", name);
    find(".lines").replaceChildren();
    const answer = await this.#ask("GET", `/conversation?name=${encodeURIComponent(name)}`);
    if (this.#conversation !== name) return;
    if (answer.status === 200) for (const { who, text } of answer.body) this.#line(who, text);
    else this.#line("note", told(answer));
    find(".ask textarea").focus();
    this.#listConversations();
  }

  async #listConversations() {
    const answer = await this.#ask("GET", "/conversations");
    if (answer.status !== 200) return;
    find("#names").replaceChildren(...answer.body.map((name) => Object.assign(document.createElement("option"), { value: name })));
  }

  // Questions and answers.

  #askAgent(submitted) {
    submitted.preventDefault();
    const field = submitted.target.elements.text;
    const text = field.value.trim();
    if (text === "") return;
    const id = String(++this.#turns);
    if (!this.#tell({ type: "ask", turn: id, conversation: this.#conversation, text })) {
      this.#line("note", "There is no connection at the moment.");
      return;
    }
    field.value = "";
    this.#line("user", text);
    const line = this.#line("assistant", "");
    line.ariaBusy = "true";
    this.#turn = { id, line };
    this.#allow();
  }

  #tell(said) {
    return this.#connection.send(JSON.stringify(said));
  }

  #hear({ type, turn, text, problem }) {
    if (type === "refused") this.#line("note", problem);
    if (turn !== this.#turn?.id) return;
    const { line } = this.#turn;
    if (type === "token") {
      const log = find(".lines");
      const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
      line.append(text);
      if (isAtEnd) log.scrollTop = log.scrollHeight;
      return;
    }
    this.#settle();
    if (type === "answer") {
      line.textContent = text;
      this.#listConversations();
    }
    if (type === "stopped") this.#line("note", "Stopped. Neither question nor answer is kept.");
    if (type === "failed") this.#line("note", problem);
  }

  /** Nothing is being answered any more. */
  #settle() {
    if (this.#turn === null) return;
    const { line } = this.#turn;
    line.ariaBusy = null;
    if (line.textContent === "") line.remove();
    this.#turn = null;
    this.#allow();
  }

  #allow() {
    const isBusy = this.#turn !== null;
    find(".send").disabled = isBusy;
    find(".stop").disabled = !isBusy;
    for (const part of find(".open").elements) part.disabled = isBusy;
    if (!isBusy) find(".ask textarea").focus();
  }

  // Events, and the connection.

  #event({ type, data, timestamp }) {
    const line = document.createElement("li");
    line.className = type;
    for (const [name, value] of Object.entries({ type, time: timestamp.slice(11, 19), what: EVENTS[type](data) })) {
      const part = document.createElement("span");
      part.className = name;
      part.textContent = value;
      line.append(part);
    }
    const events = find(".events");
    events.append(line);
    events.scrollTop = events.scrollHeight;
  }

  #state(state) {
    find(".state").dataset.state = state;
    if (state === "connecting") say(".state", "connecting");
    if (state === "open") say(".state", "live");
    if (state === "waiting") {
      say(".state", "reconnecting");
      if (this.#turn !== null) this.#line("note", "The connection was lost, and the answer with it.");
      this.#settle();
    }
    if (state === "ended") this.#end("You are signed out.");
  }

  async #ask(method, path, data) {
    const headers = this.#session === null ? {} : { Authorization: `Bearer ${this.#session}` };
    if (data !== undefined) headers["Content-Type"] = "application/json";
    try {
      const answer = await fetch(path, { method, headers, body: data && JSON.stringify(data) });
      return { status: answer.status, body: await answer.json() };
    } catch {
      return { status: 0, body: { detail: "The server cannot be reached." } };
    }
  }

  #line(who, text) {
    const line = document.createElement("li");
    line.className = who;
    line.textContent = text;
    find(".lines").append(line);
    find(".lines").scrollTop = find(".lines").scrollHeight;
    return line;
  }

  #show(isSignedIn) {
    find(".welcome").hidden = isSignedIn;
    find(".signed-in").hidden = !isSignedIn;
  }
}

function find(selector) {
  return document.querySelector(selector);
}

function say(where, text) {
  find(where).textContent = text;
}

function told({ status, body }) {
  return typeof body.detail === "string" ? body.detail : `The server answered ${status}.`;
}

function milliseconds(seconds) {
  return seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(1)} s`;
}

new Tab();
