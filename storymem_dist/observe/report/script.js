"use strict";
(() => {
  const root = document.documentElement;

  // Light or dark: as the system prefers, until the user chooses.
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
  const showTheme = () => button.setAttribute("aria-pressed", String(isDark()));
  button.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; showTheme(); });
  system.addEventListener("change", showTheme);
  showTheme();

  // One tip for all elements with data-tip. Assistive technology reads the same from aria-label and from the tables.
  const tip = document.getElementById("tip");
  const place = (x, y) => {
    tip.style.left = `${Math.max(8, Math.min(x + 14, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${y + 18 + tip.offsetHeight > innerHeight ? y - tip.offsetHeight - 10 : y + 18}px`;
  };
  const showTip = (event) => {
    const owner = event.target.closest ? event.target.closest("[data-tip]") : null;
    tip.hidden = !owner;
    if (owner) { tip.textContent = owner.dataset.tip; place(event.clientX, event.clientY); }
  };
  document.addEventListener("pointermove", showTip);
  document.addEventListener("pointerdown", showTip);
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });

  // Lineage: pointing at a shot, or reaching it with the keyboard, highlights only what it was shown.
  const light = (event) => {
    const column = event.target.closest ? event.target.closest(".lineage a.column") : null;
    if (!column) return;
    const picture = column.closest(".lineage");
    const shot = ["pointerover", "focusin"].includes(event.type) ? column.dataset.shot : null;
    picture.classList.toggle("chosen", Boolean(shot));
    for (const edge of picture.querySelectorAll(".edge")) edge.classList.toggle("lit", edge.dataset.to === shot);
  };
  for (const name of ["pointerover", "pointerout", "focusin", "focusout"]) document.addEventListener(name, light);

  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[data-seek]");
    if (link) {  // a link to a frame goes to the clip and shows that frame
      const card = document.getElementById(link.getAttribute("href").slice(1));
      const video = card && card.querySelector("video");
      if (!video) return;
      const seek = () => { video.currentTime = Number(link.dataset.seek) + 0.001; };
      video.pause();
      if (video.readyState > 0) seek();
      else { video.addEventListener("loadedmetadata", seek, { once: true }); video.preload = "auto"; video.load(); }
    }
    const together = event.target.closest("button.together");
    if (together) {  // two runs: both clips of a shot from the start, together
      for (const video of together.closest(".pair").querySelectorAll("video")) { video.currentTime = 0; video.play(); }
    }
  });

  // Clips start as pictures; controls appear with the first play.
  const prepareFilms = () => {
    for (const film of document.querySelectorAll(".film:not([data-ready])")) {
      film.dataset.ready = "";
      const video = film.querySelector("video");
      const play = document.createElement("button");
      play.type = "button";
      play.className = "play";
      play.textContent = "▶\uFE0E";
      play.setAttribute("aria-label", `Play ${video.getAttribute("aria-label")}`);
      const begin = () => { play.remove(); video.controls = true; };
      play.addEventListener("click", () => { begin(); video.play(); video.focus(); });
      video.addEventListener("play", begin, { once: true });
      video.addEventListener("seeking", begin, { once: true });
      video.controls = false;
      film.append(play);
    }
  };

  // Many stories: find those with these words (id, name, on a whole page also prompts) and in this state.
  const search = document.querySelector(".search");
  const findStories = () => {
    if (!search) return;
    const words = document.getElementById("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    const state = search.querySelector("input[name=state]:checked").value;
    const counts = { "": 0 };
    let shown = 0;
    const stories = document.querySelectorAll("#stories .story, #stories .row");
    for (const story of stories) {
      const is = story.querySelector("[data-state]").dataset.state;
      const text = words.length ? story.textContent.toLowerCase() : "";
      counts[is] = (counts[is] || 0) + 1;
      counts[""] += 1;
      story.hidden = Boolean(state && is !== state) || !words.every((word) => text.includes(word));
      shown += story.hidden ? 0 : 1;
    }
    for (const count of search.querySelectorAll("[data-count]")) count.textContent = counts[count.dataset.count] || 0;
    document.getElementById("filter-count").textContent = words.length || state ? `${shown} of ${stories.length}` : "";
  };
  if (search) {
    search.hidden = false;
    search.addEventListener("input", findStories);
  }

  // A live page says when it has exchanged parts.
  const prepare = () => { prepareFilms(); findStories(); };
  document.addEventListener("storymem:parts", prepare);
  prepare();
})();
