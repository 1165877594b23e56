// Keeps a served page up to date, and fills its buttons. Runs after script.js; storymemLive says what the page is.
(() => {
  const live = storymemLive;
  let have = live.digests;
  let identity = live.identity;

  // -- words at the bottom -------------------------------------------------------------------------------------------

  const make = (tag, values = {}, ...children) => {
    const made = Object.assign(document.createElement(tag), values);
    made.append(...children);
    return made;
  };
  const sheet = new CSSStyleSheet();
  sheet.replaceSync(live.style);
  document.adoptedStyleSheets = [...document.adoptedStyleSheets, sheet];
  const state = make("p", { className: "state", textContent: "connecting" });
  const note = make("p", { className: "note" });
  const words = make("aside", { className: "live" }, state, note);
  words.setAttribute("aria-label", "Live page");
  for (const line of [state, note]) line.setAttribute("role", "status");
  document.body.append(words);

  const showState = (kind, text) => {
    state.className = `state ${kind}`;
    if (state.textContent !== text) state.textContent = text;
  };
  const say = (text, wrong = false) => {
    note.classList.toggle("wrong", wrong);
    note.textContent = text;
  };

  // -- changing the page without disturbing its reader ---------------------------------------------------------------

  const isElement = (node) => node.nodeType === Node.ELEMENT_NODE;
  const keyOf = (node) => (isElement(node) ? node.dataset.part || node.id || null : null);
  const isOurs = (node) => isElement(node) && node.matches(".play");  // added by script.js, unknown to the server

  // What a reader or script.js changed: open parts, what the filter hides, what is prepared, an input's text.
  const isKept = (element, name) =>
    (name === "open" && element.tagName === "DETAILS") || (name === "hidden" && "words" in element.dataset) ||
    name === "data-ready" || (name === "hidden" && "actions" in element.dataset);

  const changeAttributes = (old, fresh) => {
    for (const { name } of [...old.attributes]) {
      if (!fresh.hasAttribute(name) && !isKept(old, name)) old.removeAttribute(name);
    }
    for (const { name, value } of [...fresh.attributes]) {
      if (old.getAttribute(name) !== value && !isKept(old, name)) old.setAttribute(name, value);
    }
  };

  const place = (parent, node, before) => {
    if (node === before) return;
    if (node.isConnected && parent.moveBefore) parent.moveBefore(node, before);  // a video goes on playing
    else parent.insertBefore(node, before);
  };

  const change = (old, fresh) => {
    if (old.nodeType !== Node.ELEMENT_NODE) {
      if (old.nodeValue !== fresh.nodeValue) old.nodeValue = fresh.nodeValue;
      return;
    }
    changeAttributes(old, fresh);
    const isHole = "part" in old.dataset;  // another part fills it
    const isFilm = old.matches(".film") && old.querySelector("video")?.getAttribute("src") === fresh.querySelector("video")?.getAttribute("src");
    if (!isHole && !isFilm && !("actions" in old.dataset)) changeChildren(old, fresh);
  };

  const changeChildren = (old, fresh) => {
    const named = new Map();
    for (const child of old.childNodes) if (keyOf(child)) named.set(keyOf(child), child);
    let next = old.firstChild;
    const skip = () => { while (next && isOurs(next)) next = next.nextSibling; };
    for (const child of [...fresh.childNodes]) {
      skip();
      const key = keyOf(child);
      let same = null;
      if (key) same = named.get(key);
      else if (next && !keyOf(next) && next.nodeName === child.nodeName) same = next;
      if (same && same.nodeName === child.nodeName) {
        if (same === next) next = next.nextSibling;
        else place(old, same, next);
        named.delete(key);
        change(same, child);
      } else {
        old.insertBefore(child, next);
      }
    }
    while (next) {
      const rest = next;
      next = next.nextSibling;
      if (!isOurs(rest)) rest.remove();
    }
    for (const gone of named.values()) gone.remove();
  };

  const partOf = (name) => document.querySelector(`[data-part="${CSS.escape(name)}"]`);

  const changePage = (parts) => {
    const anchors = CSS.supports("overflow-anchor", "auto") ? null : firstSeen();
    const waiting = new Map(Object.entries(parts));
    for (let found = true; found && waiting.size;) {  // a part may be inside one that comes later
      found = false;
      for (const [name, text] of [...waiting]) {
        const holder = partOf(name);
        if (!holder) continue;
        const fresh = holder.cloneNode(false);
        fresh.innerHTML = text;
        changeChildren(holder, fresh);
        waiting.delete(name);
        found = true;
      }
    }
    document.dispatchEvent(new CustomEvent("storymem:parts"));
    showActions();
    if (anchors) scrollBy(0, anchors.element.getBoundingClientRect().top - anchors.top);
  };

  const firstSeen = () => {
    for (const element of document.querySelectorAll("main [id]")) {
      const { top, bottom } = element.getBoundingClientRect();
      if (bottom > 60 && bottom - top < innerHeight) return { element, top };
    }
    return null;
  };

  // -- news ----------------------------------------------------------------------------------------------------------

  let source = null;
  let newest = null;
  let busy = false;
  let watch = 0;
  const page = `page=${encodeURIComponent(live.page.toWellFormed?.() ?? live.page)}`;

  const lost = () => showState("lost", "connection lost, trying again");

  const follow = () => {
    clearTimeout(watch);
    if (source) source.close();
    if (document.visibilityState === "hidden") { source = null; return; }  // nobody looks: nothing is read
    source = new EventSource(`${live.base}events?${page}&known=${identity}`);
    source.onopen = () => { showState("open", "live"); expectLife(); };
    source.onmessage = (event) => { expectLife(); newest = JSON.parse(event.data); update(); };
    source.addEventListener("alive", expectLife);
    source.onerror = () => { lost(); if (source && source.readyState === EventSource.CLOSED) later(); };
  };
  const expectLife = () => { clearTimeout(watch); watch = setTimeout(() => { lost(); follow(); }, live.aliveSeconds * 2500); };
  const later = () => {
    clearTimeout(watch);
    watch = setTimeout(async () => {
      const answer = await fetch(`${live.base}parts?${page}&name=`).catch(() => null);
      if (answer && (answer.status === 403 || answer.status === 404)) {
        showState("lost", (await answer.json().catch(() => ({}))).error || "this page is gone");
      }
      follow();
    }, 3000);
  };

  const update = async () => {
    if (busy) return;
    busy = true;
    try {
      while (newest) {
        const news = newest;
        newest = null;
        const names = Object.keys(news.digests).filter((name) => have[name] !== news.digests[name]);
        if (names.length) {
          const asked = names.length > 200 ? "" : names.map((name) => `&name=${encodeURIComponent(name)}`).join("");
          const answer = await fetch(`${live.base}parts?${page}${asked}`);
          if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
          const { parts, digests } = await answer.json();
          for (const name of Object.keys(parts)) have[name] = digests[name];
          changePage(parts);
        }
        const gone = Object.keys(have).filter((name) => !(name in news.digests));
        if (!news.trouble) for (const name of gone) delete have[name];
        if (!news.trouble && gone.some(partOf)) location.reload();  // the frame is another one: a small run became a large one
        identity = news.identity;
        live.paused = news.paused;
        live.skipped = news.skipped;
        showActions();
        if (news.trouble) showState("lost", news.trouble);
        else showState("open", "live");
      }
    } catch {
      lost();
      later();
    } finally {
      busy = false;
    }
  };

  // -- buttons -------------------------------------------------------------------------------------------------------

  const takeToken = () => {
    const found = /^#token=([A-Za-z0-9_-]+)$/.exec(location.hash);
    try {
      if (found) sessionStorage.setItem("storymem-token", found[1]);
      if (found) history.replaceState(null, "", location.pathname + location.search);
      return found ? found[1] : sessionStorage.getItem("storymem-token");
    } catch {
      return found ? found[1] : null;
    }
  };
  const given = takeToken();  // the list of runs keeps it for their pages
  const token = live.control ? given : null;
  if (live.control && !token) say("To use the buttons, open the address that storymem-report printed, with its token.");

  const ask = (question, explanation, answers) => new Promise((done) => {
    const title = make("h2", { id: "live-question", textContent: question });
    const choices = [...answers.map(([text, value]) => [text, value]), ["Cancel", null]];
    const buttons = choices.map(([text, value]) => {
      const button = make("button", { type: "button", textContent: text });
      button.addEventListener("click", () => { dialog.close(); done(value); });
      return button;
    });
    const dialog = make("dialog", { className: "ask" }, title, make("p", { textContent: explanation }), make("div", {}, ...buttons));
    dialog.setAttribute("aria-labelledby", "live-question");
    dialog.addEventListener("cancel", () => done(null));
    dialog.addEventListener("close", () => dialog.remove());
    document.body.append(dialog);
    dialog.showModal();
    buttons.at(-1).focus();
  });

  const send = async (button, request) => {
    button.setAttribute("aria-busy", "true");
    try {
      const answer = await fetch(`${live.base}control`, {
        method: "POST",
        headers: { "content-type": "application/json", "x-storymem-token": token },
        body: JSON.stringify(request),
      });
      const value = await answer.json();
      say(answer.ok ? value.text : value.error, !answer.ok);
    } catch {
      say("Not sent: the connection is lost.", true);
    } finally {
      button.removeAttribute("aria-busy");
    }
  };

  const again = async (button, story, shot) => {
    const what = shot ? `${shot} of ${story}` : `all shots of ${story}`;
    const answers = shot ? [["This shot and those that need it", false], ["Only this shot", true]] : [["Render again", false]];
    const explanation = shot
      ? "Its clip is replaced by a new one. Shots that remember or continue it are rendered again as well, unless you choose only this shot."
      : "Its clips are replaced by new ones.";
    const only = await ask(`Render ${what} again?`, explanation, answers);
    if (only !== null) send(button, { action: "rerender", story_id: story, shots: shot ? [shot] : [], only });
  };

  const stop = async (button) => {
    const now = await ask(
      "Stop all jobs of this run?",
      "Nothing is lost: the same command continues it. Now means after the running step; its checkpoint stays.",
      [["After the running shots", false], ["Now", true]],
    );
    if (now !== null) send(button, { action: "stop", now });
  };

  // A button: its text, and what it does. Texts depend on the queue, so they are looked up anew each time.
  const ofRun = {
    hold: () => (live.paused ? ["Resume", (b) => send(b, { action: "resume" })] : ["Pause", (b) => send(b, { action: "pause" })]),
    stop: () => ["Stop", stop],
  };
  const ofStory = (story) => ({
    first: () => ["First", (b) => send(b, { action: "first", story_id: story })],
    skip: () => (live.skipped.includes(story)
      ? ["Unskip", (b) => send(b, { action: "unskip", story_id: story })]
      : ["Skip", (b) => send(b, { action: "skip", story_id: story })]),
    again: () => ["Render again", (b) => again(b, story, null)],
  });
  const ofShot = (story, shot) => ({ again: () => ["Render again", (b) => again(b, story, shot)] });

  const showActions = () => {
    if (!token) return;
    for (const holder of document.querySelectorAll("[data-actions]")) {
      const { actions: story, shot } = holder.dataset;
      const target = [story, shot].filter(Boolean).join(" ") || "the run";
      if (!holder.firstChild) {
        const kinds = story === "" ? ofRun : shot ? ofShot(story, shot) : ofStory(story);
        for (const look of Object.values(kinds)) {
          const button = make("button", { type: "button" });
          button.look = look;
          button.addEventListener("click", () => button.look()[1](button));
          holder.append(button);
        }
        holder.classList.add("actions");
      }
      const state = shot && holder.parentElement.querySelector("[data-state]");
      holder.hidden = Boolean(state) && state.dataset.state === "waiting";  // there is nothing to render again
      for (const button of holder.children) {
        const [text] = button.look();
        if (button.textContent === text) continue;
        button.textContent = text;
        button.setAttribute("aria-label", `${text}: ${target}`);
      }
    }
  };

  showActions();
  document.addEventListener("visibilitychange", () => {
    if (document.visibilityState === "hidden") showState("", "paused while hidden");
    follow();
  });
  addEventListener("pagehide", () => { if (source) source.close(); });
  addEventListener("pageshow", (event) => { if (event.persisted) follow(); });
  follow();
})();
