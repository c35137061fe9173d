/* What our pages share. A page has its own ZH: the Chinese of each text, by the English. */
const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
let language = navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";

function t(key, values = {}) {
  const text = (language === "zh" && Object.hasOwn(ZH, key) && ZH[key]) || key;
  return text.replace(/\{(\w+)\}/g, (whole, name) => (Object.hasOwn(values, name) ? values[name] : whole));
}
const number = (n) => n.toLocaleString("en");
const readable = (value) => (typeof value === "string" ? value : JSON.stringify(value, null, 2) ?? "");

function make(tag, attributes = {}, ...children) { return fill(document.createElement(tag), attributes, children); }
function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function useTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = t(theme === "dark" ? "Light theme" : "Dark theme");
}

/** Say everything that has a data-t, data-t-label or data-t-placeholder in a language. */
function translate(chosen) {
  language = chosen;
  document.documentElement.lang = chosen === "zh" ? "zh-CN" : "en";
  $("language").textContent = chosen === "zh" ? "English" : "中文";
  $("language").lang = chosen === "zh" ? "en" : "zh-CN";
  for (const node of document.querySelectorAll("[data-t]")) node.textContent = t(node.dataset.t);
  for (const node of document.querySelectorAll("[data-t-label]")) node.setAttribute("aria-label", t(node.dataset.tLabel));
  for (const node of document.querySelectorAll("[data-t-placeholder]")) node.placeholder = t(node.dataset.tPlaceholder);
  useTheme(document.documentElement.dataset.theme);
}

/** Begin in the reader's language and theme, and follow the two buttons; `useLanguage` shows the page in a language. */
function begin(useLanguage) {
  const darkWanted = matchMedia("(prefers-color-scheme: dark)");
  darkWanted.addEventListener("change", () => useTheme(darkWanted.matches ? "dark" : "light"));
  $("language").addEventListener("click", () => useLanguage(language === "zh" ? "en" : "zh"));
  $("theme").addEventListener("click", () => useTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
  useTheme(darkWanted.matches ? "dark" : "light");
  useLanguage(language);
}
