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
  for (const picture of document.querySelectorAll("svg.lineage")) {
    const light = (shot) => {
      picture.classList.toggle("chosen", Boolean(shot));
      for (const edge of picture.querySelectorAll(".edge")) edge.classList.toggle("lit", edge.dataset.to === shot);
    };
    for (const column of picture.querySelectorAll("a.column")) {
      for (const name of ["pointerenter", "focus"]) column.addEventListener(name, () => light(column.dataset.shot));
      for (const name of ["pointerleave", "blur"]) column.addEventListener(name, () => light(null));
    }
  }

  // A link to a frame goes to the clip and shows that frame.
  for (const link of document.querySelectorAll("a[data-seek]")) {
    link.addEventListener("click", () => {
      const card = document.getElementById(link.getAttribute("href").slice(1));
      const video = card && card.querySelector("video");
      if (!video) return;
      const seek = () => { video.currentTime = Number(link.dataset.seek) + 0.001; };
      video.pause();
      if (video.readyState > 0) seek();
      else { video.addEventListener("loadedmetadata", seek, { once: true }); video.preload = "auto"; video.load(); }
    });
  }

  // Clips start as pictures; controls appear with the first play.
  for (const film of document.querySelectorAll(".film")) {
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

  // Two runs: both clips of a shot from the start, together.
  for (const together of document.querySelectorAll("button.together")) {
    together.addEventListener("click", () => {
      for (const video of together.closest(".pair").querySelectorAll("video")) { video.currentTime = 0; video.play(); }
    });
  }

  // Many stories: find those whose name or prompts contain the words.
  const filter = document.getElementById("filter");
  if (filter) {
    const stories = [...document.querySelectorAll("#stories .story")];
    const count = document.getElementById("filter-count");
    filter.addEventListener("input", () => {
      const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const story of stories) {
        story.hidden = !words.every((word) => story.dataset.words.includes(word));
        shown += story.hidden ? 0 : 1;
      }
      count.textContent = words.length ? `${shown} of ${stories.length}` : "";
    });
  }
})();
